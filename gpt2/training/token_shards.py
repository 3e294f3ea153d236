"""Read files of token ids of this package, nanoGPT (uint16), llm.c and build-nanogpt (.bin, .npy). It knows no text.

nanoGPT writes uint16 ids and nothing else. llm.c writes 256 int32 first: a magic number, a version, and the number of ids.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gpt2.data.kind import LLMC_MAGICS, Kind, kind_of
from gpt2.data.source import Source
from gpt2.training.token_file import TokenFile
from gpt_config.errors import DataError

CHUNK = 1 << 20  # ids in memory at a time
_LLMC_HEADER_BYTES = 1024
_FOR_VALIDATION = re.compile(r"(?:^|[_.\-])(?:val|valid|validation|dev)(?:[_.\-]|$)", re.IGNORECASE)
_FOR_TRAINING = re.compile(r"(?:^|[_.\-])train(?:ing)?(?:[_.\-]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class TokenShard:
    """The ids of a file, as a view of it. `vocab_size` is None if the file does not say it."""

    name: str
    tokens: NDArray[Any]
    vocab_size: int | None = None

    def chunks(self) -> Iterator[NDArray[np.int64]]:
        """Yield the ids in parts of bounded size."""
        for start in range(0, len(self.tokens), CHUNK):
            yield self.tokens[start : start + CHUNK].astype(np.int64)

    def check(self, vocab_size: int, owner: str) -> None:
        """Raise DataError for an id of `vocab_size` or more, which `owner` does not have. It reads the whole file."""
        if self.vocab_size is not None and self.vocab_size <= vocab_size:
            return
        for chunk in self.chunks():
            wrong = chunk[(chunk < 0) | (chunk >= vocab_size)]
            if len(wrong):
                has = "" if self.vocab_size is None else f" has {self.vocab_size} token ids and"
                raise DataError(
                    f"{self.name}{has} contains id {wrong[0]}, and {owner} has {vocab_size}: "
                    "name the tokenizer or model that it belongs to"
                )


def open_shard(path: str | Path, kind: Kind | None = None) -> TokenShard:
    """Open a file of token ids. DataError if it is damaged, or is no such file."""
    source = Source(str(path))
    kind = kind or kind_of(source)
    if kind.name == "raw" and (Path(path).parent / "meta.pkl").exists():
        raise DataError(
            f"{path} has the ids of the vocabulary in meta.pkl beside it, which is not read: name the text (input.txt)"
        )
    if kind.name == "gpt2" and not source.is_compressed():
        file = TokenFile.open(path)
        return TokenShard(source.name, file.tokens, file.vocab_size)
    with _bytes_of(source) as raw:
        if kind.name == "gpt2":
            return _own(raw, source.name)
        if kind.name == "npy":
            return _npy(raw, source.name)
        if kind.name == "llm.c":
            return _llmc(raw, source.name)
        if kind.name == "raw":
            return TokenShard(source.name, _mapped(raw, source.name, np.dtype("<u2"), 0))
    raise DataError(f"{path} is not a file of token ids: name one, or texts only")


@contextlib.contextmanager
def _bytes_of(source: Source) -> Iterator[IO[bytes]]:
    """The file itself, or its decompressed content in a temporary file, which a memory map can keep."""
    if not source.is_compressed():
        with source.open() as file:
            yield file
        return
    with tempfile.TemporaryFile() as temporary, source.open() as stream:
        while block := stream.read(1 << 20):
            temporary.write(block)
        temporary.seek(0)
        yield temporary


def _size(raw: IO[bytes]) -> int:
    place = raw.tell()
    size = raw.seek(0, 2)
    raw.seek(place)
    return size


def _mapped(raw: IO[bytes], name: str, dtype: np.dtype[Any], start: int, count: int | None = None) -> NDArray[Any]:
    n_bytes = _size(raw) - start
    expected = n_bytes if count is None else count * dtype.itemsize
    if n_bytes != expected or n_bytes % dtype.itemsize:
        raise DataError(f"{name} has {n_bytes} bytes of ids instead of {expected}, it is damaged: copy or download it again")
    if not n_bytes:
        return np.empty(0, dtype)
    mapped: NDArray[Any] = np.memmap(raw, dtype, "r", start, (n_bytes // dtype.itemsize,))
    return mapped


def _own(raw: IO[bytes], name: str) -> TokenShard:
    with tempfile.NamedTemporaryFile(suffix=".bin") as copy:
        while block := raw.read(1 << 20):
            copy.write(block)
        copy.flush()
        try:
            file = TokenFile.open(copy.name)
        except DataError as error:
            raise DataError(str(error).replace(copy.name, name)) from None
        return TokenShard(name, file.tokens, file.vocab_size)


def _llmc(raw: IO[bytes], name: str) -> TokenShard:
    if _size(raw) < _LLMC_HEADER_BYTES:
        raise DataError(f"{name} has {_size(raw)} bytes, less than llm.c's header, it is damaged: copy or download it again")
    header = np.frombuffer(raw.read(_LLMC_HEADER_BYTES), "<i4")
    return TokenShard(name, _mapped(raw, name, np.dtype(f"<u{LLMC_MAGICS[int(header[0])]}"), 1024, int(header[2])))


def _npy(raw: IO[bytes], name: str) -> TokenShard:
    try:
        version = np.lib.format.read_magic(raw)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(raw)
    except ValueError as error:
        raise DataError(f"{name} is not a readable array of NumPy ({error}): save it again") from None
    if len(shape) != 1 or dtype.kind not in "iu":
        raise DataError(f"{name} is an array of {dtype} with the shape {shape}: token ids are whole numbers in one row")
    return TokenShard(name, _mapped(raw, name, dtype, raw.tell(), shape[0]))


def split_by_name(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Divide shards such as edufineweb_train_000001.npy and edufineweb_val_000000.npy into (training, validation).

    The second list is empty unless some names say that they are for training and others that they are for validation.
    """
    validation = [path for path in paths if _FOR_VALIDATION.search(path.stem)]
    if not any(_FOR_TRAINING.search(path.stem) for path in paths if path not in validation):
        return list(paths), []
    return [path for path in paths if path not in validation], validation


def bytes_of_ids(token_bytes: Any, vocab_size: int, separator: int | None) -> NDArray[np.int64]:
    """The number of bytes of each id (vocab_size,); 0 for the separator, which is not text, and for ids without bytes."""
    sizes = np.zeros(vocab_size, np.int64)
    for token_id, content in token_bytes.items():
        sizes[token_id] = len(content)
    if separator is not None:
        sizes[separator] = 0
    return sizes
