"""Writes tensors to a safetensors file that this package and transformers can read, completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gpt_config.atomic_write import atomic_write
from gpt_config.errors import WriteError


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file completely or not at all. Raises WriteError if it cannot be written."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        atomic_write(path, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))
    except SafetensorError as error:  # the library raises this instead of OSError
        raise WriteError(f"cannot write {path} ({error}): free disk space; the old file is unchanged") from None
