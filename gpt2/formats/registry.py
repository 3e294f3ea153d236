"""The formats that `gpt2 import` and `gpt2 export` know, and what each of their modules has.

To add a format: a module here with the names of `ReadableFormat` or `RunnableFormat`, a line in `_MODULES`, and how its
files are recognised, in `gpt2.weights.foreign`.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from gpt2.weights.foreign import TITLES, WRITTEN_TITLES, foreign_format, written_format
from gpt_config.errors import CheckpointError
from gpt_config.model_config import GPT2Config

if TYPE_CHECKING:
    from torch import Tensor

    from gpt2.formats.stored import Stored
    from gpt2.model import GPT2
    from gpt_encoder.interface import Tokenizer

# The module of each format.
_MODULES = {
    "openai": "openai_tensorflow",
    "nanogpt": "nanogpt",
    "llmc": "llmc",
    "gguf": "gguf",
    "onnx": "onnx",
    "ctranslate2": "ctranslate2",
    "safetensors": "safetensors",
}
READABLE = tuple(name for name in _MODULES if name in TITLES)
WRITABLE = tuple(_MODULES)

# Rows of OpenAI's vocabulary, and the same number rounded up to a multiple of 64, as nanoGPT trains it.
OPENAI_ROWS = (50257, 50304)


class Imported(NamedTuple):
    """What a file contains: the tensors have the published names and shapes. `tokenizer`: if the file has one."""

    config: GPT2Config
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None = None


class Format(Protocol):
    """A module of this package for one format."""

    @property
    def TITLE(self) -> str:
        """What a file of the format is called in messages: "a nanoGPT checkpoint"."""

    @property
    def DTYPES(self) -> tuple[str, ...]:
        """The dtypes in which it can be written."""

    @property
    def IS_FOLDER(self) -> bool:
        """Whether it is a folder of several files."""

    def write(self, model: GPT2, tokenizer: Tokenizer | None, path: Path, dtype: str) -> None:
        """Write a float32 `model` to `path`, not atomically. InputError for what the format cannot say."""


class ReadableFormat(Format, Protocol):
    """A format that can be read back as a model."""

    def read(self, path: Path) -> Imported:
        """Read a file or folder. CheckpointError, in one line, for what it is not."""


class Engine(Protocol):
    """A written model in the program that it is for."""

    @property
    def precision(self) -> str:
        """float32, or the dtype to which weights were rounded."""

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V), float32, of ids (B, T), int64."""

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """Return the `n_new` greedy ids after `prompt`; none of them ends the text."""


class RunnableFormat(Format, Protocol):
    """A format that can only be written: other programs run it."""

    def stored_weights(self, path: Path) -> list[Stored]:
        """Return the weights of a written model. CheckpointError if it is damaged; InputError if a package is missing."""

    def load_engine(self, path: Path) -> Engine:
        """Return what runs a written model. CheckpointError if it is damaged; InputError if a package is missing."""


def load_format(name: str) -> Format:
    """Return the module of a format."""
    return cast(Format, import_module(f"gpt2.formats.{_MODULES[name]}"))


def load_readable(name: str) -> ReadableFormat:
    """Return the module of a format that is not in WRITTEN_TITLES."""
    return cast(ReadableFormat, load_format(name))


def load_runnable(name: str) -> RunnableFormat:
    """Return the module of a format in WRITTEN_TITLES."""
    return cast(RunnableFormat, load_format(name))


def read_foreign(path: Path, name: str | None = None) -> Imported:
    """Read a file or folder of another program: in the format `name`, or in the one that its content shows.

    Raises CheckpointError if it is damaged or in none of the formats.
    """
    found = name or foreign_format(path)
    if found is None:
        if not path.exists():
            raise CheckpointError(f"there is no file or folder {str(path)!r}: check the path")
        if written := written_format(path):
            raise CheckpointError(
                f"{path} is {WRITTEN_TITLES[written]}, which can only be written: use the model that it was made from"
            )
        known = ", ".join(TITLES[readable] for readable in READABLE)
        raise CheckpointError(f"{path} is none of these: {known}; name the file, or its format if you know it")
    return load_readable(found).read(path)


def config_of(path: Path, title: str, **fields: object) -> GPT2Config:
    """Return the config with these fields of a file. Its end token is OpenAI's if the vocabulary has OpenAI's size.

    CheckpointError, which names the file, for sizes that no model has.
    """
    end = 50256 if fields.get("vocab_size") in OPENAI_ROWS else None
    try:
        return GPT2Config.from_dict({"bos_token_id": end, "eos_token_id": end, **fields})
    except ValueError as error:
        raise CheckpointError(f"{path} is not {title} of a GPT-2 ({error}): use another file") from None


def with_end_token(config: GPT2Config, token_id: int | None) -> GPT2Config:
    """Return `config` with the end token of its tokenizer."""
    return dataclasses.replace(config, bos_token_id=token_id, eos_token_id=token_id)
