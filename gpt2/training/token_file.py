"""Token ids in a memory-mapped file: a header of 64 bytes, then uint16 or uint32 ids in the byte order of the machine.

    bytes  0 to 7    magic "GPT2TOKS"
    bytes  8 to 11   version, 1 (a file of the other byte order has another number here, and is refused)
    bytes 12 to 15   bytes per id, 2 or 4
    bytes 16 to 23   number of ids in the vocabulary
    bytes 24 to 31   number of ids in the file
    bytes 32 to 39   bytes of the UTF-8 text that the ids encode, without separators
    bytes 40 to 63   fingerprint of the texts and options from which the file was made

Depends on NumPy, not on texts or batches.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gpt_config.errors import DataError, WriteError

_MAGIC, _VERSION = b"GPT2TOKS", 1
_HEADER = struct.Struct("=8sIIQQQ24s")
FINGERPRINT_BYTES = 24


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest dtype that can hold every id of the vocabulary: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class TokenFile:
    """An open token file.

    `tokens` (n,) is a view of the file, uint16 or uint32. `n_bytes` is the size of the text that it encodes.
    """

    path: Path
    tokens: NDArray[Any]
    vocab_size: int
    n_bytes: int
    fingerprint: bytes

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TokenFile:
        """Map the file into memory. DataError if it is missing, incomplete or not a token file."""
        path = Path(path)
        try:
            with open(path, "rb") as file:
                header = file.read(_HEADER.size)
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}): encode the text again") from None
        if len(header) < _HEADER.size:
            raise DataError(f"{path} is not a token file (it has {len(header)} bytes): encode the text again")
        magic, version, item_size, vocab_size, n_tokens, n_bytes, fingerprint = _HEADER.unpack(header)
        if magic != _MAGIC or version != _VERSION or item_size not in (2, 4):
            raise DataError(f"{path} is not a token file of version {_VERSION}: encode the text again")
        expected_size = _HEADER.size + n_tokens * item_size
        if size != expected_size:
            raise DataError(f"{path} has {size} bytes instead of {expected_size}, it is damaged: encode the text again")
        dtype = np.uint16 if item_size == 2 else np.uint32
        # Zero bytes cannot be mapped.
        tokens = np.memmap(path, dtype, "r", _HEADER.size, (n_tokens,)) if n_tokens else np.empty(0, dtype)
        return cls(path, tokens, vocab_size, n_bytes, fingerprint)

    def __len__(self) -> int:
        return len(self.tokens)

    def largest_id(self) -> int:
        """The largest id in the file, or -1 if it has none. It reads the whole file."""
        return int(self.tokens.max(initial=0)) if len(self) else -1


class TokenWriter:
    """Writes a token file piece by piece, in a `with` block. An incomplete file is deleted.

    The file gets its name when it is complete. `n_tokens` is the number of ids so far. WriteError if the disk is full or the
    folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], vocab_size: int, fingerprint: bytes) -> None:
        self._path = Path(path)
        self._temporary = self._path.with_name(f".{self._path.name}.tmp")
        self._dtype, self._vocab_size, self._fingerprint = dtype_for(vocab_size), vocab_size, fingerprint
        self.n_tokens = self._n_bytes = 0
        self._file: IO[bytes]

    def __enter__(self) -> TokenWriter:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "wb")
            self._file.write(bytes(_HEADER.size))
        except OSError as error:
            raise self._write_error(error) from None
        return self

    def append(self, ids: bytes, n_bytes: int) -> None:
        """Append ids, given as the bytes of an array of `dtype_for(vocab_size)`. They encode `n_bytes` of text."""
        try:
            self._file.write(ids)
        except OSError as error:
            raise self._write_error(error) from None
        self.n_tokens += len(ids) // self._dtype.itemsize
        self._n_bytes += n_bytes

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                header = (_MAGIC, _VERSION, self._dtype.itemsize, self._vocab_size, self.n_tokens, self._n_bytes)
                self._file.seek(0)
                self._file.write(_HEADER.pack(*header, self._fingerprint))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self._path)
        except OSError as problem:
            raise self._write_error(problem) from None
        finally:
            with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _write_error(self, error: OSError) -> WriteError:
        return WriteError(f"cannot write {self._path} ({error.strerror}): free disk space, or choose another folder")
