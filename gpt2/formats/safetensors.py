"""A model folder, as this package and transformers use it, in another dtype."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpt2.formats.hub_files import write_hub_files
from gpt2.formats.registry import Imported
from gpt2.weights.files import read_tensors
from gpt2.weights.for_others import write_chat_template
from gpt2.weights.names import published_names
from gpt2.weights.reading import read_config
from gpt2.weights.tokenizer import folder_of
from gpt2.weights.writing import write_weights

if TYPE_CHECKING:
    from gpt2.model import GPT2
    from gpt_encoder.interface import Tokenizer

TITLE = "a model folder"
DTYPES = ("float32", "float16", "bfloat16")
IS_FOLDER = True


def read(path: Path) -> Imported:
    """Read the config and the weights of a folder, without its tokenizer. CheckpointError if they are damaged."""
    return Imported(read_config(path), published_names(read_tensors(path), path))


def write(model: GPT2, tokenizer: Tokenizer | None, path: Path, dtype: str) -> None:
    """Write the folder."""
    write_weights(path, model.state_dict(), dtype=getattr(torch, dtype))
    write_hub_files(model, tokenizer, path, dtype=dtype)
    if source := folder_of(model):
        write_chat_template(path, source)
