"""The header of a safetensors file, checked with the standard library: all engines accept and refuse the same files.

The format: eight bytes with the length of the header, the header in JSON, then the raw numbers of all tensors, in order and
without gaps. It is described at https://huggingface.co/docs/safetensors. This module knows nothing of GPT-2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_config.errors import CheckpointError
from gpt_config.file_reading import open_regular, parse_json
from gpt_config.lfs import pointer_message

# The types of the format, and the size of one number in bits.
ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16,
    "U8": 8, "BOOL": 8, "C64": 64, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# Bytes. The format's own limit for the header: without a limit, eight random bytes could request all memory.
_MAX_HEADER_BYTES = 100_000_000

# The limit of PyTorch.
_MAX_DIMENSIONS = 64

# Numbers of the header are unsigned and have 64 bits.
_MAX_NUMBER = (1 << 64) - 1


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: `n_bytes` bytes from byte `start` of the file `path`, row after row, little-endian."""

    path: Path
    dtype: str  # a key of ITEM_BITS
    shape: tuple[int, ...]
    start: int
    n_bytes: int

    def read_bytes(self) -> bytes:
        """The raw bytes of the tensor. CheckpointError if the file cannot be read."""
        try:
            with open_regular(self.path) as file:
                file.seek(self.start)
                return file.read(self.n_bytes)
        except OSError as error:
            raise CheckpointError(
                f"cannot read {self.path} ({error.strerror}): check the file and its permissions"
            ) from None


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a safetensors file is stored, by name.

    CheckpointError if the file is damaged or truncated, names a tensor twice, or has bytes that belong to no tensor or to
    two: each reader would take other numbers from such a file.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            n_header = int.from_bytes(file.read(8), "little")
            if size < 8 or n_header > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"its header should have {n_header} bytes, but the file has {size} bytes")
            header = _parse(file.read(n_header))
        tensors = {name: _stored_tensor(path, name, entry, 8 + n_header) for name, entry in header.items()}
        _check_layout(tensors, 8 + n_header, size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): check the file and its permissions") from None
    except ValueError as error:
        message = pointer_message(path) or f"{path} is not a readable safetensors file ({error}): download it again"
        raise CheckpointError(message) from None
    return tensors


def _parse(content: bytes) -> dict[str, Any]:
    """The entries of the header by name, without `__metadata__`. ValueError if it is not an object, or has a key twice."""
    text = content.decode("utf-8")
    header = parse_json(text, object_pairs_hook=_unique, parse_int=_number, parse_constant=_refuse) if text[:1] == "{" else 0
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    if "\\u" in text:
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # a ValueError for half of a surrogate pair
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise ValueError("__metadata__ must map names to strings")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"its header has {name!r:.80} twice")
        content[name] = value
    return content


def _number(digits: str) -> int:
    if digits[0] == "-" or len(digits) > 20 or int(digits) > _MAX_NUMBER:
        raise ValueError(f"its header contains the number {digits:.40}")
    return int(digits)


def _refuse(constant: str) -> None:
    raise ValueError(f"its header contains {constant}")


def _stored_tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """One entry of the header: {"dtype": "F32", "shape": [2, 3], "data_offsets": [first byte, last byte + 1]}."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        is_whole = (
            isinstance(shape, list)
            and len(shape) <= _MAX_DIMENSIONS
            and all(type(number) is int for number in (*shape, begin, end))
        )
        is_known = dtype in ITEM_BITS
    except (KeyError, TypeError, ValueError):
        is_whole = is_known = False
    if not is_whole or not is_known or not isinstance(entry["data_offsets"], list):
        raise ValueError(f"the entry of {name!r:.80} has no valid dtype, shape or data_offsets")
    if math.prod(filter(None, shape)) > _MAX_NUMBER or math.prod(shape) * ITEM_BITS[dtype] != 8 * (end - begin):
        raise ValueError(f"{name!r:.80} has {end - begin} bytes, which does not fit {dtype} and shape {shape!s:.80}")
    return StoredTensor(path, dtype, tuple(shape), data_start + begin, end - begin)


def _check_layout(tensors: Mapping[str, StoredTensor], data_start: int, file_size: int) -> None:
    """Raise ValueError unless each byte after the header belongs to exactly one tensor."""
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].n_bytes)):
        if tensor.start != end:
            fault = "overlaps another tensor" if tensor.start < end else f"begins {tensor.start - end} bytes after the last"
            raise ValueError(f"{name!r:.80} {fault}")
        end += tensor.n_bytes
    if end > file_size:
        raise ValueError(f"its tensors end at byte {end}, but the file has {file_size} bytes")
    if end < file_size:
        raise ValueError(f"{file_size - end} bytes follow the last tensor")
