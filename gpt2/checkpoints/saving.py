"""From a GPT2 to a folder that this package and transformers load. It knows the layout of such a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gpt2.checkpoints.model_tokenizer import tokenizer_of
from gpt2.finetuning.lora import merged_parameters
from gpt2.quantization import is_int8
from gpt_config.atomic_write import atomic_write, atomic_write_json
from gpt_config.errors import WriteError
from gpt_config.model_config import INT8_MODEL_TYPE

if TYPE_CHECKING:
    from gpt2.model import GPT2
    from gpt_encoder.interface import Tokenizer


def save_model(model: GPT2, folder: str | os.PathLike[str], *, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors and the tokenizer's files; each file is written whole or not at all.

    The tokenizer is the one given, else that of the folder the model was loaded from, else OpenAI's if the model is new
    and has a vocabulary of that size. Adapters are merged into the weights that are written, not into the model.
    """
    folder = Path(folder)
    write_tensors(folder / "model.safetensors", merged_parameters(model))
    values = {**model.config.to_dict(), "dtype": str(model.dtype).removeprefix("torch.")}
    if is_int8(model):
        values["model_type"] = INT8_MODEL_TYPE
    atomic_write_json(folder / "config.json", values)
    tokenizer = tokenizer or tokenizer_of(model)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all. WriteError if there is no room."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        atomic_write(path, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))
    except SafetensorError as error:  # an OSError of the library's own kind
        raise WriteError(f"cannot write {path} ({error}): make room; the file is as it was") from None
