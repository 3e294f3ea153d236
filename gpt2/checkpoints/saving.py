"""From a GPT2 to a folder that this package and transformers load. It knows the layout of such a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from gpt_config.atomic_write import atomic_write, atomic_write_json
from gpt_config.model_config import GPT2Config
from gpt_encoder.tokenizer import GPT2Tokenizer, has_tokenizer, load_tokenizer

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
    atomic_write(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    dtype = str(model.wte.weight.dtype).removeprefix("torch.")
    atomic_write_json(folder / "config.json", {**model.config.to_dict(), "dtype": dtype})
    tokenizer = tokenizer or _tokenizer_of(model)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _tokenizer_of(model: GPT2) -> Tokenizer | None:
    if model.pretrained_from is not None:
        return load_tokenizer(model.pretrained_from) if has_tokenizer(model.pretrained_from) else None
    return GPT2Tokenizer.from_pretrained() if model.config.vocab_size == GPT2Config().vocab_size else None
