"""Open files or standard input, decompressed by content (.gz, .xz, .bz2, .zst). It does not know what they contain."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

from gpt_config.errors import DataError
from gpt_config.file_reading import open_regular

COMPRESSED_SUFFIXES = (".gz", ".xz", ".bz2", ".zst")
_ZSTD = b"\x28\xb5\x2f\xfd"
_MAGICS: dict[bytes, str] = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\0": ".xz", b"BZh": ".bz2", _ZSTD: ".zst"}
_MAGIC_BYTES = 10
_CHUNK = 1 << 20  # bytes per read of a compressed file


@dataclass(frozen=True)
class Source:
    """A file, or bytes such as standard input. `name` is its name in messages."""

    name: str
    content: bytes | None = None  # None: the file `name`

    @property
    def suffix(self) -> str:
        """The last suffix in lower case, without that of a compression: ".jsonl" of "A.JSONL.gz"."""
        path = Path(self.name)
        suffix = path.suffix.lower()
        return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix

    @property
    def size(self) -> int:
        """Bytes, before decompression."""
        return os.stat(self.name).st_size if self.content is None else len(self.content)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open for reading, decompressed. A file that cannot be read, within the `with` block too, is a DataError."""
        try:
            with self._raw() as raw:
                compression = _compression_of(raw)
                if not compression:
                    yield raw
                    return
                with _decompressed(raw, compression) as stream:
                    yield stream
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read {self.name} ({reason}): check the path and the file") from None

    def head(self, n_bytes: int) -> bytes:
        """The first `n_bytes` of the decompressed content, fewer if it is shorter."""
        with self.open() as stream:
            return stream.read(n_bytes)

    def is_compressed(self) -> bool:
        """Whether the content has to be decompressed."""
        with self._raw() as raw:
            return bool(_compression_of(raw))

    @contextmanager
    def seekable(self) -> Iterator[IO[bytes]]:
        """Like `open`, for readers that seek: compressed content is decompressed into a temporary file first."""
        with self.open() as stream:
            if isinstance(stream, io.BufferedReader | io.BytesIO) and not self.is_compressed():
                yield stream
                return
            with tempfile.TemporaryFile() as file:
                while chunk := stream.read(_CHUNK):
                    file.write(chunk)
                file.seek(0)
                yield file

    def _raw(self) -> BinaryIO:
        return open_regular(self.name) if self.content is None else io.BytesIO(self.content)


def _compression_of(raw: BinaryIO) -> str:
    start = raw.read(_MAGIC_BYTES)
    raw.seek(0)
    for magic, suffix in _MAGICS.items():
        # A text may begin with "BZh", so the start of the first block, or of an empty file's end, has to follow.
        if start.startswith(magic) and (suffix != ".bz2" or start[4:] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")):
            return suffix
    return ""


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zstd}
    return cast("BinaryIO", openers[compression](raw, "rb"))


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes) -> bytes: ...


def _open_zstd(raw: BinaryIO, mode: str) -> io.BufferedReader:
    return io.BufferedReader(_ZstdReader(raw), _CHUNK)


def _zstd_decompressor() -> tuple[Callable[[], _Decompressor], type[Exception]]:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14

        return zstd.ZstdDecompressor, zstd.ZstdError
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise DataError(
            "reading .zst needs Python 3.14 or the package zstandard: pip install zstandard, or decompress the file"
        ) from None
    return zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError


class _ZstdReader(io.RawIOBase):
    """All frames of a .zst file, one after another. EOFError if the last frame is incomplete."""

    def __init__(self, raw: BinaryIO) -> None:
        self._make, self._error = _zstd_decompressor()
        self._raw, self._frame, self._ready = raw, self._make(), b""
        self._has_begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while not self._ready:
            if self._frame.eof:
                rest, self._frame, self._has_begun = self._frame.unused_data, self._make(), False
                chunk = rest or self._raw.read(_CHUNK)
            else:
                chunk = self._raw.read(_CHUNK)
            if not chunk:
                if self._has_begun:
                    raise EOFError("the compressed file ended before the end of its content")
                return 0
            self._has_begun = True
            try:
                self._ready = self._frame.decompress(chunk)
            except self._error as error:
                raise OSError(str(error)) from None
        n_bytes = min(len(view), len(self._ready))
        view[:n_bytes], self._ready = self._ready[:n_bytes], self._ready[n_bytes:]
        return n_bytes
