"""Writes tensors to safetensors files that this package and transformers can read: in one file or in shards.

Each file is written completely or not at all. `gpt_config.whole_folder` does the same for all files of a folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gpt_config.atomic_write import atomic_write, atomic_write_json
from gpt_config.errors import ConfigError, InputError, WriteError

# transformers' default.
MAX_SHARD_SIZE = "50GB"

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file completely or not at all. Raises WriteError if it cannot be written."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        atomic_write(path, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))
    except SafetensorError as error:  # the library raises this instead of OSError
        raise WriteError(f"cannot write {path} ({error}): free disk space; the old file is unchanged") from None


def write_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write model.safetensors, or shards with an index if the tensors have more than `max_shard_size` bytes.

    `max_shard_size` is a number of bytes, or such as "500MB" or "5GB". A larger tensor has a shard of its own. With `dtype`,
    floating-point tensors are converted, one shard at a time.

    Raises ConfigError for a wrong size, InputError if a number is too large for `dtype`, and WriteError.
    """
    shards = _split({name: _n_bytes(tensor, dtype) for name, tensor in tensors.items()}, n_bytes_of(max_shard_size))
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", _converted(tensors, shards[0], dtype))
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, _converted(tensors, names, dtype))
        weight_map |= dict.fromkeys(names, file)
    total = sum(_n_bytes(tensor, dtype) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    atomic_write_json(folder / "model.safetensors.index.json", index)


def n_bytes_of(size: int | str) -> int:
    """Return the bytes of a size such as 5000, "500MB" or "1.5 GB". Units are decimal, as transformers'.

    >>> n_bytes_of("1.5GB")
    1500000000
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]B|)", str(size).upper()) if type(size) in (int, str) else None
    n_bytes = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if n_bytes < 1:
        raise ConfigError(
            f'max_shard_size={size!r:.80} is not a size: give a number of bytes, or such as "500MB" or "5GB"',
            field="max_shard_size",
        )
    return n_bytes


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Return the names in groups of at most `limit` bytes, in their order."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _n_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype.itemsize if dtype and tensor.is_floating_point() else tensor.itemsize)


def _converted(tensors: Mapping[str, Tensor], names: Iterable[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of these names in `dtype`. Raises InputError if a finite number becomes infinite."""
    converted = {}
    for name in names:
        tensor = tensors[name].detach()
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
            rounded = tensor.to(dtype)
            if bool((rounded.isinf() & tensor.isfinite()).any()):
                largest = tensor.abs().nan_to_num(posinf=0).max().item()
                raise InputError(
                    f"{name} has numbers up to {largest:.3g}, and {str(dtype).removeprefix('torch.')} ends at "
                    f"{torch.finfo(dtype).max:.3g}: save in bfloat16 or float32"
                )
            tensor = rounded
        converted[name] = tensor
    return converted
