"""From a GPT2 to a folder that this package and transformers load. It knows the layout of such a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file

from gpt2.checkpoints.model_tokenizer import tokenizer_of
from gpt_config.atomic_write import atomic_write, atomic_write_json
from gpt_config.errors import WriteError

if TYPE_CHECKING:
    from gpt2.model import GPT2
    from gpt_encoder.interface import Tokenizer


def save_model(model: GPT2, folder: str | os.PathLike[str], *, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors and the tokenizer's files; each file is written whole or not at all.

    The tokenizer is the one given, else that of the folder the model was loaded from, else OpenAI's if the model is new
    and has a vocabulary of that size.
    """
    folder = Path(folder)
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    try:
        atomic_write(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    except SafetensorError as error:  # an OSError of the library's own kind
        raise WriteError(
            f"cannot write {folder / 'model.safetensors'} ({error}): make room; the file is as it was"
        ) from None
    dtype = str(model.wte.weight.dtype).removeprefix("torch.")
    atomic_write_json(folder / "config.json", {**model.config.to_dict(), "dtype": dtype})
    tokenizer = tokenizer or tokenizer_of(model)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
