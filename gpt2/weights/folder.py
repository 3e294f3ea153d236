"""Folders of models and adapters: how they are found, and which files they must contain.

It does not import torch, so that the command line reports a missing model without waiting for that import.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gpt2.weights.foreign import TITLES, WRITTEN_TITLES, foreign_format, written_format
from gpt_config.adapter_config import AdapterConfig
from gpt_config.errors import CheckpointError, ModelNotFoundError, Remedy
from gpt_config.file_reading import read_json, special_file
from gpt_config.lfs import pointer_message
from gpt_config.locate import HUGGING_FACE, TOKENIZER_FILES, Hub, locate, user_path
from gpt_config.model_config import CONFIG_FILES, GENERATION_FILE, INT8_MODEL_TYPE
from gpt_config.shipped import shipped_models
from gpt_config.unfinished import check_finished, is_unfinished

ADAPTER_CONFIG_FILE = "adapter_config.json"

# Files with all weights, in the order of preference.
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")

# Indexes of sharded weights, in the same order.
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

# Files with the weights of an adapter, in the order of preference.
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Files that are downloaded from the hub.
_SAFETENSORS_PATTERNS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")

# Files beside a model that some commands read.
_BESIDE = ("chat_template.jinja", "instruction_template.json", "classifier.json")

# Files that are downloaded only if a repository has no safetensors.
_PYTORCH_PATTERNS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def locate_model(name_or_folder: str | os.PathLike[str], *, hub: Hub = HUGGING_FACE, revision: str | None = None) -> Path:
    """Return the folder of a model or an adapter: the user's own, a shipped one, or one in the hub's cache.

    It is downloaded if it is not in the cache. `revision` is a branch, tag or commit of the hub's repository;
    "name@revision" means the same. Raises ModelNotFoundError, which says what to do, after at most three seconds without a
    network, and CheckpointError for a file or folder of another program.
    """
    if found := foreign_model(name_or_folder):
        raise CheckpointError(
            f"{found[0]} is {TITLES[found[1]]}, not a model folder: convert it first, and use the result",
            remedy=Remedy("import", str(found[0])),
        )
    if written := written_model(name_or_folder):
        raise CheckpointError(
            f"{written[0]} is {WRITTEN_TITLES[written[1]]}, which can only be written: use the model that it was made from"
        )
    first = (
        *CONFIG_FILES,
        GENERATION_FILE,
        *TOKENIZER_FILES,
        *_BESIDE,
        *_SAFETENSORS_PATTERNS,
        ADAPTER_CONFIG_FILE,
        *_ADAPTER_WEIGHTS,
    )
    return locate(name_or_folder, files=[first, _PYTORCH_PATTERNS], complete=_is_complete, hub=hub, revision=revision)


def foreign_model(name_or_folder: str | os.PathLike[str]) -> tuple[Path, str] | None:
    """Return the path and the format of a file or folder of another program, or None for everything else."""
    if not isinstance(name_or_folder, (str, os.PathLike)) or not (path := user_path(name_or_folder)).name:
        return None
    found = foreign_format(path)
    return (path, found) if found and not is_model_folder(path) else None


def written_model(name_or_folder: str | os.PathLike[str]) -> tuple[Path, str] | None:
    """Return the path and the format of a folder that can only be written, or None for everything else."""
    if not isinstance(name_or_folder, (str, os.PathLike)) or not (path := user_path(name_or_folder)).name:
        return None
    found = written_format(path)
    return (path, found) if found and not is_model_folder(path) else None


def locate_whole_model(name_or_folder: str | os.PathLike[str]) -> Path:
    """Like `locate_model`, for callers that do not support adapters. Raises CheckpointError for an adapter."""
    folder = locate_model(name_or_folder)
    if is_adapter_folder(folder):
        raise CheckpointError(
            f"{folder} contains an adapter, but a whole model is needed: merge it into its base model, and use the result",
            remedy=Remedy("merge", str(folder)),
        )
    return folder


def locate_float_model(name_or_folder: str | os.PathLike[str]) -> Path:
    """Like `locate_whole_model`, for callers that do not support int8 either. Raises CheckpointError for int8 weights."""
    folder = locate_whole_model(name_or_folder)
    try:
        values = read_json(folder / CONFIG_FILES[0])
    except (OSError, ValueError):  # the caller reads the config and reports the error
        return folder
    if isinstance(values, dict) and values.get("model_type") == INT8_MODEL_TYPE:
        raise CheckpointError(
            f"{folder} contains int8 weights, but floats are needed: use the model before quantization, or convert it",
            remedy=Remedy("dequantize", str(folder)),
        )
    return folder


def locate_base(adapter: Path, base: str) -> Path:
    """Return the folder of an adapter's base model. `base` may be a path relative to the adapter's folder.

    Raises ModelNotFoundError if it cannot be found, and CheckpointError if it is an adapter. Both name the adapter and the
    base.
    """
    beside = adapter / base
    check_finished(beside)
    try:
        folder = beside if is_model_folder(beside) else locate_model(_shipped_here(base))
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"the adapter {adapter} needs the model {base!r} as its base: {error}; "
            "or merge the adapter into a copy of that model in another place, and use the result",
            remedy=Remedy("base_model"),
        ) from None
    if is_adapter_folder(folder):
        raise CheckpointError(
            f"the base model of the adapter {adapter} is {base!r}, which is an adapter too: merge that into a model first"
        )
    return folder


def tokenizer_source(name: str) -> str:
    """Return the folder or name to load the tokenizer of the model `name` from.

    It is the model's folder or, for an adapter without a tokenizer, the base model.
    """
    from gpt_encoder.tokenizer import has_tokenizer  # imported here, because most callers of this module do not need it

    folder = locate_model(name)
    if has_tokenizer(folder):
        return str(folder.resolve())  # a full path, because a name such as "char" has another meaning for tokenizers
    if not is_adapter_folder(folder):
        return name
    base = AdapterConfig.from_json_file(folder / ADAPTER_CONFIG_FILE).base_model or ""
    return str(folder / base) if is_model_folder(folder / base) else _shipped_here(base)


def _shipped_here(base: str) -> str:
    """Return the name of the shipped model if `base` is its path in another installation, otherwise `base`."""
    end = Path(base).parts[-3:]  # such as gpt2/assets/gpt2-tiny
    return next((name for name, folder in shipped_models().items() if folder.resolve().parts[-3:] == end), base)


def is_model_folder(folder: Path) -> bool:
    """Return whether `folder` has a config and all files of its weights."""
    try:
        return any((folder / name).is_file() for name in CONFIG_FILES) and bool(weight_files(folder))
    except (CheckpointError, OSError):
        return False


def is_adapter_folder(folder: Path) -> bool:
    """Return whether `folder` contains an adapter in peft's format. Raises CheckpointError if it contains a model too."""
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return False
    if is_model_folder(folder):
        raise CheckpointError(f"{folder} contains a model and an adapter: move the adapter_* files to a separate folder")
    return True


def holds_model_files(folder: Path) -> bool:
    """Return whether `folder` contains files of a model or an adapter, which a new model there would replace or mix with.

    Files in a folder that a killed program has not finished do not count: that program may run again.
    """
    names = (*CONFIG_FILES, *_SINGLE_FILES, *_INDEX_FILES, ADAPTER_CONFIG_FILE, *_ADAPTER_WEIGHTS)
    return not is_unfinished(folder) and any((folder / name).exists() for name in names)


def _is_complete(folder: Path) -> bool:
    if is_model_folder(folder):
        return True
    return (folder / ADAPTER_CONFIG_FILE).is_file() and any((folder / name).is_file() for name in _ADAPTER_WEIGHTS)


def adapter_file(folder: Path) -> Path:
    """Return the file of an adapter's weights. Raises CheckpointError if there is none, or if a writer has not finished."""
    check_finished(folder)
    refuse_special_files(folder, _ADAPTER_WEIGHTS)
    for name in _ADAPTER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} has no {' or '.join(_ADAPTER_WEIGHTS)}: download the adapter's weights too")


def refuse_special_files(folder: Path, names: Sequence[str]) -> None:
    """Raise CheckpointError if a folder, a pipe or a device has one of these names of files in `folder`."""
    if name := special_file(folder, names):
        raise CheckpointError(f"{folder / name} is not a regular file: replace it with the file of the model")


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights of `folder`, or an empty list if there are none.

    Raises CheckpointError if an index names files that are missing, if a folder or a pipe has the name of a file, or if a
    writer has not finished the folder.
    """
    check_finished(folder)
    refuse_special_files(folder, (*_SINGLE_FILES, *_INDEX_FILES))
    for name, index_name in zip(_SINGLE_FILES, _INDEX_FILES, strict=True):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index_name).is_file():
            return _shards(folder / index_name)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = read_json(index)["weight_map"]
        names = sorted({name.removeprefix("./") for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        message = pointer_message(index) or f"{index} is not a readable index of shards: download it again"
        raise CheckpointError(message) from None
    present = set(os.listdir(index.parent))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(
                f"{index} names the shard {name!r}, which is not a file in the same folder: download it again"
            )
        if name not in present:
            raise CheckpointError(f"{index} names the shard {name!r}, which is missing: download that too")
    return [index.parent / name for name in names]
