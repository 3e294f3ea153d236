"""What makes a folder a model: its config, its weights, and where such a folder is found. It needs no torch.

So the command line can say that a model is not there without waiting for torch to be imported.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from gpt_config.errors import CheckpointError
from gpt_config.locate import TOKENIZER_FILES, locate

CONFIG_FILES = ("config.json", "hparams.json")

# In the order in which they are looked for.
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

# For the hub: safetensors are preferred, and the older format is only fetched from a repository that has no other.
_SAFETENSORS_PATTERNS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_PYTORCH_PATTERNS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def locate_model(name_or_folder: str | os.PathLike[str]) -> Path:
    """The folder of a model: one of the user's, one that ships, or one in the hub's cache, downloaded if need be.

    ModelNotFoundError says what to do; without a network it comes within three seconds.
    """
    first = (*CONFIG_FILES, *TOKENIZER_FILES, *_SAFETENSORS_PATTERNS)
    return locate(name_or_folder, files=[first, _PYTORCH_PATTERNS], complete=is_model_folder)


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` has a config and all files of its weights."""
    try:
        return any((folder / name).is_file() for name in CONFIG_FILES) and bool(weight_files(folder))
    except CheckpointError:
        return False


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of `folder`, or an empty list. CheckpointError if an index names files it lacks."""
    for name, index_name in zip(_SINGLE_FILES, _INDEX_FILES, strict=True):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index_name).is_file():
            return _shards(folder / index_name)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} is not a readable index of shards: get it again") from None
    present = set(os.listdir(index.parent))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names the shard {name!r}, which is not a file beside it: get it again")
        if name not in present:
            raise CheckpointError(f"{index} names the shard {name!r}, which is missing: get it too")
    return [index.parent / name for name in names]
