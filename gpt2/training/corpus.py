"""Read documents from files, in pieces, so that no file has to fit in memory. Depends on file formats, not on tokenizers.

In a text file, `<|endoftext|>` separates documents; a file without it is one document. In a JSONL file, the text field of
each line is a document. Files may be compressed (.gz, .xz, .bz2).
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from gpt_config.errors import DataError
from gpt_encoder.interface import EOT_TOKEN

_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_SUFFIXES = (".txt", ".jsonl")
# The characters to which the error handler "surrogateescape" decodes bytes that are not UTF-8.
_UNDECODED = re.compile(r"[\udc80-\udcff]")
# GPT-2's pattern always splits between a non-space and a space or line end, so a cut there changes no ids.
_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)
# A corpus of at least this many documents is split into whole documents, a smaller one within each document.
_DOCUMENTS_TO_CHOOSE_FROM = 100


@dataclass(frozen=True)
class CorpusLimits:
    """The sizes in which texts are read and cut. They do not change the ids."""

    block_bytes: int = 1 << 20  # bytes per read from a file
    piece_length: int = 1 << 20  # characters; a longer document is cut into several pieces


class Piece(NamedTuple):
    """Part of a document. `ends` is True for the last part."""

    text: str
    ends: bool


@dataclass
class Corpus:
    """The documents of some files. `replaced_bytes` counts the bytes read so far that were not UTF-8.

    DataError if a file is missing or unreadable, or if a line of a JSONL file is not an object with a text field.
    """

    paths: Sequence[str | Path]
    text_field: str = "text"  # of JSONL files
    limits: CorpusLimits = field(default_factory=CorpusLimits)
    replaced_bytes: int = field(default=0, init=False)

    def files(self) -> list[Path]:
        """Return the files; those in a folder are sorted by path."""
        files: list[Path] = []
        for path in map(Path, self.paths):
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in _SUFFIXES)
                if not inside:
                    raise DataError(
                        f"the folder {path} has no {' or '.join(_SUFFIXES)} files: name files, or another folder"
                    )
                files += inside
            elif path.is_file():
                files.append(path)
            else:
                raise DataError(f"there is no file or folder {path}: check the path")
        return files

    def pieces(self) -> Iterator[Piece]:
        """Yield all documents in order, in pieces of bounded length."""
        self.replaced_bytes = 0
        for path in self.files():
            try:
                yield from self._jsonl(path) if _kind(path) == ".jsonl" else self._text(path)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise DataError(
                    f"cannot read {path} ({getattr(error, 'strerror', None) or error}): check the file"
                ) from None

    def _text(self, path: Path) -> Iterator[Piece]:
        rest, is_first, has_separators = "", True, False
        piece_length = self.limits.piece_length
        for block in self._blocks(path):
            *whole, rest = (rest + block).split(EOT_TOKEN)
            has_separators = has_separators or bool(whole)
            for text in whole:
                yield from _piece(text, is_first, ends=True, stripped=True)
                is_first = True
            if len(rest) >= piece_length and (cut := last_cut(rest)):
                yield from _piece(rest[:cut], is_first, ends=False, stripped=has_separators)
                rest, is_first = rest[cut:], False
        yield from _piece(rest, is_first, ends=True, stripped=has_separators)

    def _jsonl(self, path: Path) -> Iterator[Piece]:
        piece_length = self.limits.piece_length
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(self._decoded(line.decode("utf-8", errors="surrogateescape")))[self.text_field]
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}, line {number}: not JSON ({error}): fix or remove the line") from None
                except (KeyError, TypeError, IndexError):
                    raise DataError(
                        f"{path}, line {number}: no field {self.text_field!r}: set text_field to the field with the text"
                    ) from None
                if not isinstance(text, str):
                    raise DataError(
                        f"{path}, line {number}: the field {self.text_field!r} is {type(text).__name__}, not a string: "
                        "fix or remove the line"
                    )
                while len(text) > 2 * piece_length and (cut := last_cut(text[:piece_length])):
                    yield Piece(text[:cut], ends=False)
                    text = text[cut:]
                yield from _piece(text, True, ends=True, stripped=False)

    def _blocks(self, path: Path) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        with _open(path) as file:
            block = file.read(self.limits.block_bytes).removeprefix(codecs.BOM_UTF8)
            while block:
                yield self._decoded(decoder.decode(block))
                block = file.read(self.limits.block_bytes)
        yield self._decoded(decoder.decode(b"", final=True))

    def _decoded(self, text: str) -> str:
        if text.isascii():
            return text
        replaced, count = _UNDECODED.subn("\ufffd", text)
        self.replaced_bytes += count
        return replaced


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix


def _open(path: Path) -> IO[bytes]:
    opener: Any = _OPENERS.get(path.suffix, open)
    return cast("IO[bytes]", opener(path, "rb"))


def last_cut(text: str) -> int:
    """Return the last position at which a cut of `text` changes no ids; 0 if there is none."""
    tail = max(0, len(text) - (1 << 16))  # the cut is nearly always near the end, so search there first
    found = _CUT.match(text, tail) or _CUT.match(text)
    return found.end() if found else 0


def _piece(text: str, is_first: bool, *, ends: bool, stripped: bool) -> Iterator[Piece]:
    """Yield the piece without the line ends next to a separator; nothing if the document is empty."""
    if stripped and is_first:
        text = text.lstrip("\r\n")
    if stripped and ends:
        text = text.rstrip("\r\n")
    if text or (ends and not is_first):
        yield Piece(text, ends)


@dataclass(frozen=True)
class Split:
    """Which text is for validation: whole documents, chosen by a hash, or the end of each document if there are few.

    The hash covers the first 4,096 characters of a document, so copies of a document are on the same side.
    """

    fraction: float  # of the text, for validation
    cuts: tuple[int, ...] | None  # if there are few documents: how many characters of each are for training

    @classmethod
    def of(cls, corpus: Corpus, fraction: float) -> Split:
        """Return the split of `corpus`. Reads only as many documents as it takes to see whether there are few."""
        lengths = [0]
        for piece in corpus.pieces():
            lengths[-1] += len(piece.text)
            if piece.ends:
                lengths.append(0)
            if len(lengths) > _DOCUMENTS_TO_CHOOSE_FROM:
                return cls(fraction, None)
        return cls(fraction, tuple(int(length * (1 - fraction)) for length in lengths[:-1]))

    def sides(self, corpus: Corpus) -> Iterator[tuple[bool, Piece]]:
        """Yield (is_validation, piece) for each piece of `corpus`. A piece that spans the cut is yielded in two parts."""
        if self.cuts is None:
            yield from self._by_document(corpus)
        else:
            yield from self._by_place(corpus, self.cuts)

    def _by_document(self, corpus: Corpus) -> Iterator[tuple[bool, Piece]]:
        begins, is_validation = True, False
        for piece in corpus.pieces():
            if begins:
                start = piece.text[:4096].encode("utf-8", errors="surrogatepass")
                is_validation = zlib.crc32(start) < self.fraction * 2**32
            yield is_validation, piece
            begins = piece.ends

    def _by_place(self, corpus: Corpus, cuts: Sequence[int]) -> Iterator[tuple[bool, Piece]]:
        document = 0
        left = cuts[0] if cuts else 0  # characters of this document still to come for training; -1 after the cut
        has_train = has_validation = False
        for piece in corpus.pieces():
            before, after = piece.text[: max(0, left)], piece.text[max(0, left) :]
            if left >= 0:
                ends = left <= len(piece.text)
                has_train = has_train or bool(before)
                if before or (ends and has_train):
                    yield False, Piece(before, ends)
                left = -1 if ends else left - len(piece.text)
            if left < 0:
                has_validation = has_validation or bool(after)
                if after or (piece.ends and has_validation):
                    yield True, Piece(after, piece.ends)
            if piece.ends:
                document += 1
                left = cuts[document] if document < len(cuts) else 0
                has_train = has_validation = False
