"""Reads a GGUF file: its metadata and where its tensors are. Quantized numbers need the `gguf` package. It knows no model.

The format: magic number, version, counts, then keys with typed values, then the tensors' names, shapes, types and offsets,
then their numbers. It is described in ggml's docs/gguf.md. Everything is checked against the size of the file.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt_config.errors import CheckpointError
from gpt_config.file_reading import open_regular

# The types of values by their numbers; 8 is a string, and 9 an array.
_VALUES = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

# The types of tensors that are no groups.
_FLOATS = {0: ("<f4", torch.float32), 1: ("<f2", torch.float16), 30: ("<i2", torch.bfloat16)}

# Types with equal steps between the numbers of a group: which bytes of a group are numbers and not scales, these bytes for
# the least and for the largest number, and the steps between the two.
_ALL_BITS = (0x00, 0xFF)
_EQUAL_STEPS: dict[str, tuple[slice, tuple[int, int], int]] = {
    "Q8_0": (slice(2, None), (0x81, 0x7F), 254),
    "Q4_0": (slice(2, None), _ALL_BITS, 15),
    "Q4_1": (slice(4, None), _ALL_BITS, 15),
    "Q5_0": (slice(2, None), _ALL_BITS, 31),
    "Q5_1": (slice(4, None), _ALL_BITS, 31),
    "Q2_K": (slice(16, 80), _ALL_BITS, 3),
    "Q3_K": (slice(96), _ALL_BITS, 7),
    "Q4_K": (slice(16, None), _ALL_BITS, 15),
    "Q5_K": (slice(16, None), _ALL_BITS, 31),
    "Q6_K": (slice(192), _ALL_BITS, 63),
}

# Keys, tensors, and levels of arrays: a hundred times those of any GPT-2.
_MAX_ITEMS, _MAX_LEVELS = 100_000, 2


class Stored(NamedTuple):
    """Where a tensor is stored: its shape with the rows first, and the number of its type."""

    shape: tuple[int, ...]
    kind: int
    start: int
    n_bytes: int


class Container(NamedTuple):
    """The metadata by keys, and the tensors by names."""

    path: Path
    values: dict[str, object]
    tensors: dict[str, Stored]


def read_container(path: Path) -> Container:
    """Read everything but the numbers. CheckpointError if the file is damaged."""
    try:
        with open_regular(path) as file:
            return _Reader(path, file).container()
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): check the file and its permissions") from None
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file ({error}): copy it again") from None


def read_numbers(container: Container, name: str) -> Tensor:
    """Return a tensor: float types as they are, quantized ones in float32."""
    stored, content = container.tensors[name], _content(container, name)
    if stored.kind in _FLOATS:
        layout, dtype = _FLOATS[stored.kind]
        values = torch.from_numpy(np.frombuffer(content, dtype=layout).copy()).view(dtype)
        return values.view(stored.shape)
    return _dequantized(container, name, content)


def has_equal_steps(kind: int) -> bool:
    """Whether a quantized type has equal steps between the numbers of a group, so that `read_range` knows them."""
    return kind_name(kind).upper() in _EQUAL_STEPS


def read_range(container: Container, name: str) -> tuple[Tensor, Tensor, int]:
    """Return the least and the largest number that each place of a tensor can have, and the number of steps between them.

    Both follow from the scales in the file: the tensor is read with each number replaced by the least, or the largest.
    """
    stored, content = container.tensors[name], _content(container, name)
    title = kind_name(stored.kind)
    numbers, fills, n_steps = _EQUAL_STEPS[title.upper()]
    ends = []
    for fill in fills:
        groups = np.frombuffer(content, dtype=np.uint8).reshape(-1, group_sizes(title)[1]).copy()
        groups[:, numbers] = fill
        ends.append(_dequantized(container, name, groups.tobytes()))
    low, high = torch.minimum(*ends), torch.maximum(*ends)  # a scale may be negative
    return low, high, n_steps


def _content(container: Container, name: str) -> bytes:
    stored = container.tensors[name]
    try:
        with open_regular(container.path) as file:
            file.seek(stored.start)
            return file.read(stored.n_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot read {container.path} ({error.strerror}): check the file") from None


def _dequantized(container: Container, name: str, content: bytes) -> Tensor:
    import gguf

    stored = container.tensors[name]
    kind = gguf.GGMLQuantizationType(stored.kind)
    try:
        rows = np.frombuffer(content, dtype=np.uint8).reshape(*stored.shape[:-1], -1)
        with np.errstate(all="ignore"):  # a damaged scale is NaN or infinite
            return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(rows, kind)))
    except (NotImplementedError, ValueError):
        raise CheckpointError(
            f"{container.path} has {name!r:.80} as {kind.name}, which the gguf package cannot convert: use q8_0 or float16"
        ) from None


def kind_name(kind: int) -> str:
    """Return the name of a type of tensors: a dtype of torch, or such as "q4_0"."""
    if kind in _FLOATS:
        return str(_FLOATS[kind][1]).removeprefix("torch.")
    import gguf

    return str(gguf.GGMLQuantizationType(kind).name).lower()


def group_sizes(name: str) -> tuple[int, int]:
    """Return the numbers in a group of a quantized type such as "q4_0", and its bytes."""
    import gguf

    return _group(gguf.GGMLQuantizationType[name.upper()])


class _Reader:
    """Reads from the start of a file of known size; each length in the file is checked against what is left."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = file.seek(0, 2)
        file.seek(0)

    def container(self) -> Container:
        if self._bytes(4) != b"GGUF":
            raise ValueError("its first bytes are not GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3")
        n_tensors, n_values = self._count(), self._count()
        values: dict[str, object] = {}
        for _ in range(n_values):
            key = self._string()
            values[key] = self._value(self._number("<I"))
        described = [self._tensor() for _ in range(n_tensors)]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
            raise ValueError(f"its alignment is {alignment!r:.40}")
        begin = -(-self._file.tell() // alignment) * alignment
        tensors = {}
        for name, stored in described:
            if name in tensors:
                raise ValueError(f"it contains {name!r:.80} twice")
            if begin + stored.start + stored.n_bytes > self._size:
                raise ValueError(f"{name!r:.80} ends after the end of the file")
            tensors[name] = stored._replace(start=begin + stored.start)
        return Container(self._path, values, tensors)

    def _tensor(self) -> tuple[str, Stored]:
        name, n_dimensions = self._string(), self._number("<I")
        if not 1 <= n_dimensions <= 4:
            raise ValueError(f"{name!r:.80} has {n_dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(n_dimensions))[::-1]  # the file has the columns first
        kind, start = self._number("<I"), self._number("<Q")
        if kind in _FLOATS:
            n_bytes = math.prod(shape) * np.dtype(_FLOATS[kind][0]).itemsize
        else:
            group, group_bytes = _group(kind)
            if shape[-1] % group:
                raise ValueError(f"{name!r:.80} has rows of {shape[-1]} numbers, not of whole groups of {group}")
            n_bytes = math.prod(shape) // group * group_bytes
        return name, Stored(shape, kind, start, n_bytes)

    def _value(self, kind: int, level: int = 0) -> object:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            if level == _MAX_LEVELS:
                raise ValueError("it has arrays in arrays in arrays")
            inner, length = self._number("<I"), self._number("<Q")
            if length > self._size - self._file.tell():
                raise ValueError(f"an array has {length} values")
            return [self._value(inner, level + 1) for _ in range(length)]
        if kind not in _VALUES:
            raise ValueError(f"a value has the unknown type {kind}")
        return struct.unpack(_VALUES[kind], self._bytes(struct.calcsize(_VALUES[kind])))[0]

    def _string(self) -> str:
        return self._bytes(self._number("<Q")).decode("utf-8")

    def _count(self) -> int:
        number = self._number("<Q")
        if number > _MAX_ITEMS:
            raise ValueError(f"it names {number} items")
        return number

    def _number(self, layout: str) -> int:
        number: int = struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]
        return number

    def _bytes(self, length: int) -> bytes:
        if length > self._size - self._file.tell():
            raise ValueError("it is truncated")
        return self._file.read(length)


def _group(kind: int) -> tuple[int, int]:
    """The numbers in a group of a quantized type, and its bytes. ValueError for unknown types."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError("reading quantized GGUF files needs gguf: pip install '.[benchmark]'") from None
    sizes: dict[int, tuple[int, int]] = {int(known): size for known, size in gguf.GGML_QUANT_SIZES.items()}
    if kind not in sizes:
        raise ValueError(f"a tensor has the unknown type {kind}")
    return sizes[kind]
