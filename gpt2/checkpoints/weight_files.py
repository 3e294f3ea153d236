"""Weight files: safetensors, sharded safetensors and `pytorch_model.bin`, read as views of the mapped file.

It knows formats, and nothing of GPT-2. Nothing but tensors is ever unpickled.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt_config.errors import CheckpointError

# In the order in which they are looked for.
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

# For the hub: safetensors are preferred, and the older format is only fetched from a repository that has no other.
SAFETENSORS_PATTERNS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PYTORCH_PATTERNS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of `folder`, or an empty list. CheckpointError if an index names files it lacks."""
    for name, index_name in zip(_SINGLE_FILES, _INDEX_FILES, strict=True):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index_name).is_file():
            return _shards(folder / index_name)
    return []


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `folder` by their names in the files, on the CPU and mapped from disk where the format allows.

    CheckpointError names the file that is missing or broken.
    """
    files = weight_files(folder)
    if not files:
        raise CheckpointError(
            f"{folder} has no weights: it needs model.safetensors, its shards with model.safetensors.index.json, "
            "or pytorch_model.bin"
        )
    tensors: dict[str, Tensor] = {}
    for path in files:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
        twice = tensors.keys() & content.keys()
        if twice:
            raise CheckpointError(f"{path} holds {min(twice)!r}, which another shard holds too: download the files again")
        tensors |= content
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({_first_line(error)}): get it again") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of before 2020 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a readable file of tensors ({_first_line(error)}): get it again, or convert it to safetensors"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{path} does not hold a state dict of tensors: save model.state_dict() and nothing around it")
    return content


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not a readable index of shards: get it again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names the shard {name!r}, which is not a file beside it: get it again")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names the shard {name!r}, which is missing: get it too")
    return [index.parent / name for name in names]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
