"""TensorFlow's checkpoints (`NAME.index` and `NAME.data-00000-of-00001`), read and written without TensorFlow.

The index is a table in LevelDB's format: keys that share their beginnings, in blocks with checksums, and a footer. Its
values are small protocol buffers (`tensor_bundle.proto`), one per tensor. The data files hold raw numbers. This module
knows nothing of GPT-2.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2.formats.crc32c import masked_crc32c
from gpt_config.errors import CheckpointError
from gpt_config.file_reading import open_regular

# The last eight bytes of a table.
TABLE_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)

_FOOTER_BYTES = 48

# After each block: how it is compressed, and its checksum.
_TRAILER_BYTES = 5

# Bytes. GPT-2 XL with Adam's variables has an index of 100 kB.
_MAX_INDEX_BYTES = 50_000_000

# How the key of a part of a tensor begins. Names of variables do not begin so.
_PART = b"\x00"

# TensorFlow's numbers of the dtypes that weights can have. NumPy has no bfloat16: its bits are read as uint16.
DTYPES = {1: "float32", 2: "float64", 14: "bfloat16", 19: "float16"}
_NUMPY = {"float32": "<f4", "float64": "<f8", "bfloat16": "<u2", "float16": "<f2"}


# A part of a tensor: the first index and the number of indices of each dimension, or (0, -1) for all of them.
Part = tuple[tuple[int, int], ...]


class Entry(NamedTuple):
    """Where a tensor is stored: its bytes in a data file, and their checksum. `dtype` is one of DTYPES, or "".

    A tensor with `parts`, as TensorFlow's partitioners make them, has no bytes itself: each part has an entry.
    """

    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    parts: tuple[Part, ...] = ()


class Bundle(NamedTuple):
    """The index of a checkpoint. `prefix` is its path without the end `.index`; `parts` has the keys of `part_key`."""

    prefix: Path
    n_shards: int
    entries: dict[str, Entry]
    parts: dict[bytes, Entry]


def read_index(prefix: Path) -> Bundle:
    """Return the index of the checkpoint `prefix`. CheckpointError if it is damaged or not a checkpoint's."""
    path = _index_of(prefix)
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            if not _FOOTER_BYTES <= size <= _MAX_INDEX_BYTES:
                raise ValueError(f"it has {size} bytes")
            content = file.read()
        items = dict(_items(content))
        header = _fields(items.pop(b"", b""))
        n_shards = _number(header, 1)
        if _number(header, 2):
            raise ValueError("its numbers are big-endian")
        if not 1 <= n_shards <= 100_000:
            raise ValueError(f"it names {n_shards} data files")
        stored = {key: _entry(value) for key, value in items.items()}
        entries = {key.decode("utf-8"): entry for key, entry in stored.items() if not key.startswith(_PART)}
        parts = {key: entry for key, entry in stored.items() if key.startswith(_PART)}
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): check the file and its permissions") from None
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a readable index of a TensorFlow checkpoint ({error}): copy it again"
        ) from None
    return Bundle(prefix, n_shards, entries, parts)


def read_tensor(bundle: Bundle, name: str) -> NDArray[np.generic]:
    """Return the numbers of a tensor; those of bfloat16 as uint16. CheckpointError if they are damaged or missing."""
    entry = bundle.entries[name]
    return _joined(bundle, name, entry) if entry.parts else _stored_at(bundle, name, entry)


def part_key(name: str, part: Part) -> bytes:
    """Return the key under which a part of the tensor `name` is stored.

    Keys sort by name, then by place: numbers begin with their length in unary, as in TensorFlow's `OrderedCode`.
    """
    escaped = name.encode().replace(b"\x00", b"\x00\xff")
    numbers = b"".join(_ordered(number) for extent in part for number in extent)
    return _PART + escaped + b"\x00\x01" + bytes([1, len(part)]) + numbers


def _ordered(number: int) -> bytes:
    if number < 0:  # -1, the only one: all indices of a dimension
        return b"\x7f"
    n_bytes = number.bit_length() // 7 + 1
    if n_bytes > 8:
        raise ValueError(f"has the size {number}")
    return (number ^ ((1 << n_bytes) - 1) << (7 * n_bytes)).to_bytes(n_bytes, "big")


def _joined(bundle: Bundle, name: str, entry: Entry) -> NDArray[np.generic]:
    """The tensor `name` from its parts. CheckpointError if one is missing, or if they overlap."""
    try:
        places = [_place(part, entry.shape) for part in entry.parts]
        stored = [bundle.parts.get(part_key(name, part)) for part in entry.parts]
        for place, each in zip(places, stored, strict=True):
            if each is None or each.dtype != entry.dtype or each.shape != tuple(p.stop - p.start for p in place):
                raise ValueError("lacks a part")
        if sum(math.prod(each.shape) for each in stored if each) != math.prod(entry.shape):
            raise ValueError("has parts of another size")
        pieces = [_stored_at(bundle, name, each) for each in stored if each]
        values = np.empty(entry.shape, dtype=pieces[0].dtype)
        is_filled = np.zeros(entry.shape, dtype=np.bool_)
        for place, piece in zip(places, pieces, strict=True):
            values[place], is_filled[place] = piece, True
        if not is_filled.all():
            raise ValueError("has parts that overlap")
    except ValueError as error:
        raise CheckpointError(f"{_index_of(bundle.prefix)}: {name!r:.80} {error}: copy the file again") from None
    return values


def _place(part: Part, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a part is in its tensor. ValueError if it is not in it."""
    if len(part) != len(shape):
        raise ValueError("has a part with other dimensions")
    place = [(0, size) if n < 0 else (first, first + n) for (first, n), size in zip(part, shape, strict=True)]
    if any(end > size for (_, end), size in zip(place, shape, strict=True)):
        raise ValueError("has a part outside of its shape")
    return tuple(slice(*each) for each in place)


def _stored_at(bundle: Bundle, name: str, entry: Entry) -> NDArray[np.generic]:
    path = _data_file(bundle.prefix, entry.shard, bundle.n_shards)
    try:
        with open_regular(path) as file:
            values = _read(file, entry)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): copy all files of the checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {name!r:.80} {error}: copy the file again") from None
    return values


def write_bundle(prefix: Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Write float32 tensors as the checkpoint `prefix`, with one data file. Raises OSError."""
    records: list[tuple[bytes, bytes]] = [(b"", _message((1, 1), (3, _message((1, 1)))))]
    offset = 0
    with open(_data_file(prefix, 0, 1), "wb") as file:
        for name, tensor in sorted(tensors.items(), key=lambda item: item[0].encode()):
            values = np.ascontiguousarray(tensor, dtype="<f4")
            shape = b"".join(_field(2, _message((1, size))) for size in values.shape)
            place = [_field(4, offset), _field(5, values.nbytes)] if offset else [_field(5, values.nbytes)]
            crc = bytes([6 << 3 | 5]) + struct.pack("<I", masked_crc32c(values.reshape(-1).view(np.uint8)))
            records.append((name.encode(), _field(1, 1) + _field(2, shape) + b"".join(place) + crc))
            file.write(values.data)
            offset += values.nbytes
    _index_of(prefix).write_bytes(_table(records))


def _index_of(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.index")


def _data_file(prefix: Path, shard: int, n_shards: int) -> Path:
    return prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{n_shards:05}")


def _read(file: BinaryIO, entry: Entry) -> NDArray[np.generic]:
    if not entry.dtype:
        raise ValueError("is not of a floating-point type")
    kind = np.dtype(_NUMPY[entry.dtype])
    if math.prod(entry.shape) * kind.itemsize != entry.size:
        raise ValueError(f"has {entry.size} bytes, which does not fit {entry.dtype} and shape {entry.shape}")
    if entry.offset + entry.size > file.seek(0, 2):
        raise ValueError("ends after the end of the file")
    file.seek(entry.offset)
    content = file.read(entry.size)
    if len(content) != entry.size or masked_crc32c(content) != entry.crc:
        raise ValueError("has another checksum than the index says")
    return np.frombuffer(content, dtype=kind).reshape(entry.shape)


def _entry(content: bytes) -> Entry:
    fields = _fields(content)
    shapes = _messages(fields, 2)
    sizes = tuple(_number(dimension, 1) for dimension in _messages(shapes[-1], 2)) if shapes else ()
    if len(sizes) > 8:
        raise ValueError(f"a tensor has {len(sizes)} dimensions")
    shard, offset, size, crc = (_number(fields, key) for key in (3, 4, 5, 6))
    parts = tuple(
        tuple((_number(extent, 1), _number(extent, 2) if 2 in extent else -1) for extent in _messages(part, 1))
        for part in _messages(fields, 7)
    )
    return Entry(DTYPES.get(_number(fields, 1), ""), sizes, shard, offset, size, crc, parts)


def _items(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table. ValueError if it is damaged, or a key is not after the one before."""
    footer = content[-_FOOTER_BYTES:]
    if footer[-8:] != TABLE_MAGIC:
        raise ValueError("its last bytes are not those of a table")
    _, at = _handle(footer, 0)  # of the meta index, which is empty
    index, _ = _handle(footer, at)
    before: bytes | None = None
    for _, value in _block(content, index):
        for key, record in _block(content, _handle(value, 0)[0]):
            if before is not None and key <= before:
                raise ValueError("its keys are not in order")
            before = key
            yield key, record


def _handle(content: bytes, at: int) -> tuple[tuple[int, int], int]:
    start, at = _varint(content, at)
    size, at = _varint(content, at)
    return (start, size), at


def _block(content: bytes, handle: tuple[int, int]) -> Iterator[tuple[bytes, bytes]]:
    """The records of a block: each has the length that its key shares with the key before, and what follows."""
    start, size = handle
    end = start + size
    if end + _TRAILER_BYTES > len(content) - _FOOTER_BYTES or size < 8:
        raise ValueError("a block ends after the end of the file")
    if content[end]:
        raise ValueError("its blocks are compressed, which TensorFlow does not do")
    if masked_crc32c(content[start : end + 1]) != int.from_bytes(content[end + 1 : end + _TRAILER_BYTES], "little"):
        raise ValueError("the checksum of a block is wrong")
    block = content[start:end]
    n_restarts = int.from_bytes(block[-4:], "little")
    limit = size - 4 - 4 * n_restarts
    key, at = b"", 0
    while at < limit:
        shared, at = _varint(block, at)
        n_key, at = _varint(block, at)
        n_value, at = _varint(block, at)
        if shared > len(key) or at + n_key + n_value > limit:
            raise ValueError("a record ends after the end of its block")
        key = key[:shared] + block[at : at + n_key]
        yield key, block[at + n_key : at + n_key + n_value]
        at += n_key + n_value
    if at != limit:
        raise ValueError("a block has a wrong length")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number has more than 64 bits")


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """The fields of a protocol buffer: numbers, and bytes of inner messages, by the number of the field."""
    fields: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value: int | bytes
        if tag & 7 == 0:
            value, at = _varint(message, at)
        elif tag & 7 in (1, 2, 5):
            n_bytes, at = _varint(message, at) if tag & 7 == 2 else (8 if tag & 7 == 1 else 4, at)
            value = message[at : at + n_bytes]
            at += n_bytes
            if at > len(message):
                raise ValueError("a field ends after the end of its message")
            if tag & 7 != 2:
                value = int.from_bytes(value, "little")
        else:
            raise ValueError("a field has an unknown type")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _messages(fields: dict[int, list[int | bytes]], key: int) -> list[dict[int, list[int | bytes]]]:
    """The messages in a field."""
    contents = fields.get(key, [])
    if not all(isinstance(content, bytes) for content in contents):
        raise ValueError(f"field {key} is no message")
    return [_fields(content) for content in contents if isinstance(content, bytes)]


def _number(fields: dict[int, list[int | bytes]], key: int) -> int:
    value = fields.get(key, [0])[-1]
    if not isinstance(value, int) or value >= 1 << 63:
        raise ValueError(f"field {key} is no number")
    return value


def _message(*fields: tuple[int, int | bytes]) -> bytes:
    return b"".join(_field(key, value) for key, value in fields)


def _field(key: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return bytes([key << 3]) + _as_varint(value)
    return bytes([key << 3 | 2]) + _as_varint(len(value)) + value


def _as_varint(value: int) -> bytes:
    content = bytearray()
    while value > 127:
        content.append(value & 127 | 128)
        value >>= 7
    return bytes([*content, value])


def _table(records: list[tuple[bytes, bytes]]) -> bytes:
    """A table with one block of all records, whose keys are written in full: about 60 bytes per tensor."""
    content = _stored(records)
    data = _as_varint(0) + _as_varint(len(content) - _TRAILER_BYTES)
    footer = b""
    for block in ([], [(records[-1][0], data)]):  # the meta index, and the index of blocks by their last keys
        stored = _stored(block)
        footer += _as_varint(len(content)) + _as_varint(len(stored) - _TRAILER_BYTES)
        content += stored
    return content + footer.ljust(_FOOTER_BYTES - 8, b"\x00") + TABLE_MAGIC


def _stored(records: list[tuple[bytes, bytes]]) -> bytes:
    """A block: the records, the place of each, a byte that says "not compressed", and the checksum."""
    starts, body = [], b""
    for key, value in records:
        starts.append(len(body))
        body += b"\x00" + _as_varint(len(key)) + _as_varint(len(value)) + key + value
    starts = starts or [0]
    body += struct.pack(f"<{len(starts)}I", *starts) + struct.pack("<I", len(starts)) + b"\x00"
    return body + struct.pack("<I", masked_crc32c(body))
