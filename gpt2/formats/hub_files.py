"""The files beside the weights that programs of Hugging Face's kind read: config.json and those of the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.weights.for_others import describe_tokenizer, write_generation_config
from gpt2.weights.tokenizer import folder_of
from gpt_config.atomic_write import atomic_write_json

if TYPE_CHECKING:
    from gpt2.model import GPT2
    from gpt_encoder.interface import Tokenizer


def write_hub_files(model: GPT2, tokenizer: Tokenizer | None, folder: Path, **fields: Any) -> None:
    """Write config.json with more `fields`, generation_config.json, and the tokenizer's files, if there is one."""
    atomic_write_json(folder / "config.json", {**model.config.to_dict(), **fields})
    write_generation_config(folder, model.config, folder_of(model))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        describe_tokenizer(folder, model.config)
