"""What makes a folder a model or an adapter: config and weights, and where such a folder is found. It needs no torch.

So the command line can say that a model is not there without waiting for torch to be imported.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from gpt_config.adapter_config import AdapterConfig
from gpt_config.errors import CheckpointError, ModelNotFoundError, Remedy
from gpt_config.locate import HUGGING_FACE, TOKENIZER_FILES, Hub, locate
from gpt_config.model_config import INT8_MODEL_TYPE

CONFIG_FILES = ("config.json", "hparams.json")
ADAPTER_CONFIG_FILE = "adapter_config.json"

# In the order in which they are looked for.
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# For the hub: safetensors are preferred, and the older format is only fetched from a repository that has no other.
_SAFETENSORS_PATTERNS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_PYTORCH_PATTERNS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def locate_model(name_or_folder: str | os.PathLike[str], *, hub: Hub = HUGGING_FACE) -> Path:
    """The folder of a model or an adapter: one of the user's, one that ships, or one in the hub's cache, downloaded if
    need be.

    ModelNotFoundError says what to do; without a network it comes within three seconds.
    """
    first = (*CONFIG_FILES, *TOKENIZER_FILES, *_SAFETENSORS_PATTERNS, ADAPTER_CONFIG_FILE, *_ADAPTER_WEIGHTS)
    return locate(name_or_folder, files=[first, _PYTORCH_PATTERNS], complete=_is_complete, hub=hub)


def locate_whole_model(name_or_folder: str | os.PathLike[str]) -> Path:
    """As `locate_model`, for those that know no adapters: of one, the CheckpointError says how to make it a model."""
    folder = locate_model(name_or_folder)
    if is_adapter_folder(folder):
        raise CheckpointError(
            f"{folder} holds an adapter, and this takes a whole model: merge it into its base model, and name the result",
            remedy=Remedy("merge", str(folder)),
        )
    return folder


def locate_float_model(name_or_folder: str | os.PathLike[str]) -> Path:
    """As `locate_whole_model`, for those that know no int8 either: the CheckpointError says what to name instead."""
    folder = locate_whole_model(name_or_folder)
    try:
        values = json.loads((folder / CONFIG_FILES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # its reader will say so
        return folder
    if isinstance(values, dict) and values.get("model_type") == INT8_MODEL_TYPE:
        raise CheckpointError(f"{folder} holds weights in int8, which this does not read: name the model they were made of")
    return folder


def locate_base(adapter: Path, base: str) -> Path:
    """The folder of the model that an adapter was learned on; a relative path may start from the adapter's folder.

    ModelNotFoundError or CheckpointError names the adapter and the base.
    """
    beside = adapter / base
    try:
        folder = beside if is_model_folder(beside) else locate_model(base)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"the adapter {adapter} needs the model {base!r} that it was learned on: {error}; "
            "or merge it with that model from another place, and name the result",
            remedy=Remedy("base_model"),
        ) from None
    if is_adapter_folder(folder):
        raise CheckpointError(
            f"the adapter {adapter} was learned on {base!r}, which is an adapter too: merge that into a model first"
        )
    return folder


def tokenizer_source(name: str) -> str:
    """What to name for the tokenizer of the model `name`: its folder, or the base of an adapter that has no tokenizer."""
    from gpt_encoder.tokenizer import has_tokenizer  # here, for most who ask for a folder need none

    folder = locate_model(name)
    if has_tokenizer(folder):
        return str(folder.resolve())  # a name may mean something else to who reads it next: "char" does
    if not is_adapter_folder(folder):
        return name
    base = AdapterConfig.from_json_file(folder / ADAPTER_CONFIG_FILE).base_model or ""
    return str(folder / base) if is_model_folder(folder / base) else base


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` has a config and all files of its weights."""
    try:
        return any((folder / name).is_file() for name in CONFIG_FILES) and bool(weight_files(folder))
    except (CheckpointError, OSError):
        return False


def is_adapter_folder(folder: Path) -> bool:
    """Whether `folder` holds an adapter, as peft writes it. CheckpointError if it holds a model as well."""
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return False
    if is_model_folder(folder):
        raise CheckpointError(f"{folder} holds a model and an adapter: move the adapter_* files to a folder of their own")
    return True


def holds_model_files(folder: Path) -> bool:
    """Whether a model written into `folder` would stand in for, or beside, the files of another model or an adapter."""
    names = (*CONFIG_FILES, *_SINGLE_FILES, *_INDEX_FILES, ADAPTER_CONFIG_FILE, *_ADAPTER_WEIGHTS)
    return any((folder / name).exists() for name in names)


def _is_complete(folder: Path) -> bool:
    if is_model_folder(folder):
        return True
    return (folder / ADAPTER_CONFIG_FILE).is_file() and any((folder / name).is_file() for name in _ADAPTER_WEIGHTS)


def adapter_file(folder: Path) -> Path:
    """The file of an adapter's weights. CheckpointError if there is none."""
    for name in _ADAPTER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} has no {' or '.join(_ADAPTER_WEIGHTS)}: get the adapter's weights too")


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
