"""Weight files: safetensors, sharded safetensors and `pytorch_model.bin`, read as views of the mapped file.

It knows formats, and nothing of GPT-2. Nothing but tensors is ever unpickled.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2.weights.folder import weight_files
from gpt_config.errors import CheckpointError


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
        content = read_file(path)
        twice = tensors.keys() & content.keys()
        if twice:
            raise CheckpointError(f"{path} holds {min(twice)!r}, which another shard holds too: download the files again")
        tensors |= content
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, a safetensors file or a pickle by its name; CheckpointError if it is broken."""
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


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
    except Exception:  # a damaged pickle raises whatever its bytes happen to mean; torch's advice would be to run them
        raise CheckpointError(
            f"{path} is not a readable file of tensors: it is damaged or holds other things, which are never unpickled; "
            "get it again, or save it as safetensors"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise CheckpointError(f"{path} does not hold a state dict of tensors: save model.state_dict() and nothing around it")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
