"""Tensors to a file that this package and transformers read: whole, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gpt_config.atomic_write import atomic_write
from gpt_config.errors import WriteError


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all. WriteError if there is no room."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        atomic_write(path, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))
    except SafetensorError as error:  # an OSError of the library's own kind
        raise WriteError(f"cannot write {path} ({error}): make room; the file is as it was") from None
