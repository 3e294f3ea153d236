"""Weight files: reads safetensors, sharded safetensors and `pytorch_model.bin`, as views of the mapped file.

It depends on file formats, not on GPT-2. From a pickle, only tensors are loaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2.weights.folder import weight_files
from gpt_config.errors import CheckpointError


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of `folder` by their names in the files, on the CPU, and mapped from disk if the format allows it.

    Raises CheckpointError, which names the file, if one is missing or damaged.
    """
    files = weight_files(folder)
    if not files:
        raise CheckpointError(
            f"{folder} has no weights: it needs model.safetensors, its shards with model.safetensors.index.json, "
            "or pytorch_model.bin"
        )
    tensors: dict[str, Tensor] = {}
    for path in files:
        content = read_file(path)
        twice = tensors.keys() & content.keys()
        if twice:
            raise CheckpointError(f"{path} and another shard both contain {min(twice)!r}: download the files again")
        tensors |= content
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one file, which is read as safetensors if its name says so, and otherwise as a pickle.

    Raises CheckpointError if it is damaged.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (`file` is not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = _first_line(error)
        raise CheckpointError(f"{path} is not a readable safetensors file ({reason}): download it again") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format before 2020 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged pickle can raise anything, and torch's message advises to load it without protection
        raise CheckpointError(
            f"{path} is not a readable file of tensors: it is damaged or contains other objects, which are never unpickled; "
            "download it again, or save it as safetensors"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise CheckpointError(f"{path} does not contain a state dict of tensors: save model.state_dict() itself")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
