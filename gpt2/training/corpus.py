"""Read documents from files, in pieces, so that no file has to fit in memory. It does not depend on tokenizers.

In a text, `<|endoftext|>` separates documents; a text without it is one document. In JSON, tables and Parquet, the text
field of each record is a document. `gpt2.data` says what a file is, and reads it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gpt2.data.folders import Listing, list_files
from gpt2.data.kind import TABLE, TEXT, Kind, kind_of
from gpt2.data.records import BadRecord, Fields, numbered_columns, records_of
from gpt2.data.source import Source
from gpt2.data.tables import is_table_with
from gpt2.data.text import BLOCK_BYTES, TextBlocks, replaced
from gpt_config.errors import DataError
from gpt_encoder.interface import EOT_TOKEN, mend_surrogates

_SURROGATE = re.compile("[\ud800-\udfff]")
# GPT-2's pattern always splits between a non-space and a space or line end, so a cut there changes no ids.
_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)
# A corpus of at least this many documents is split into whole documents, a smaller one within each document.
_DOCUMENTS_TO_CHOOSE_FROM = 100


@dataclass(frozen=True)
class CorpusLimits:
    """The sizes in which texts are read and cut. They do not change the ids."""

    block_bytes: int = BLOCK_BYTES  # bytes per read from a file
    piece_length: int = 1 << 20  # characters; a longer document is cut into several pieces


class Piece(NamedTuple):
    """Part of a document. `ends` is True for the last part."""

    text: str
    ends: bool


@dataclass
class Corpus:
    """The documents of some files. The list of files is made once, by the first call that needs it.

    `replaced_bytes` counts the bytes read so far that were not UTF-8, and `replaced_halves` the halves of surrogate pairs in
    JSON. Both became U+FFFD. Files of `apart` are left out of folders.

    DataError if a file is missing, unreadable or no text, or if a record has no text field.
    """

    paths: Sequence[str | Path]
    text_field: str = "text"  # of records
    limits: CorpusLimits = field(default_factory=CorpusLimits)
    apart: Sequence[str | Path] = ()
    replaced_bytes: int = field(default=0, init=False)
    replaced_halves: int = field(default=0, init=False)
    notes: list[str] = field(default_factory=list, init=False)  # on the separators of tables
    _listing: Listing | None = field(default=None, init=False)
    _kinds: dict[Path, Kind] = field(default_factory=dict, init=False)

    def listing(self) -> Listing:
        """Return the files and what was left out of folders."""
        if self._listing is None:
            self._listing = list_files(self.paths, apart=self.apart)
        return self._listing

    def files(self) -> list[Path]:
        """Return the files; those in a folder are sorted by path."""
        return list(self.listing().files)

    def kind(self, path: Path) -> Kind:
        """Return what a file is."""
        if path not in self._kinds:
            self._kinds[path] = kind_of(Source(str(path)))
        return self._kinds[path]

    def holds_tokens(self) -> bool:
        """Whether the files contain token ids. DataError if only some of them do."""
        kinds = {path: self.kind(path).is_tokens for path in self.files()}
        if len(set(kinds.values())) > 1:
            tokens = next(path for path, is_tokens in kinds.items() if is_tokens)
            text = next(path for path, is_tokens in kinds.items() if not is_tokens)
            raise DataError(f"{tokens} contains token ids and {text} text: name files of one kind")
        return any(kinds.values())

    def pieces(self) -> Iterator[Piece]:
        """Yield all documents in order, in pieces of bounded length."""
        self.replaced_bytes = self.replaced_halves = 0
        for path in self.files():
            source, kind = Source(str(path)), self.kind(path)
            if kind.is_tokens:
                raise DataError(f"{path} contains token ids, not text: name texts, or only files of token ids")
            if kind.name == TEXT and not is_table_with(source, kind.encoding, self.text_field):
                yield from self._text(source, kind)
            else:
                yield from self._records(source, Kind(TABLE, kind.encoding) if kind.name == TEXT else kind)

    def _text(self, source: Source, kind: Kind) -> Iterator[Piece]:
        rest, is_first, has_separators = "", True, False
        piece_length = self.limits.piece_length
        for block in TextBlocks(source, kind.encoding, self.limits.block_bytes):
            *whole, rest = (rest + self._decoded(block)).split(EOT_TOKEN)
            has_separators = has_separators or bool(whole)
            for text in whole:
                yield from _piece(text, is_first, ends=True, stripped=True)
                is_first = True
            if len(rest) >= piece_length and (cut := last_cut(rest)):
                yield from _piece(rest[:cut], is_first, ends=False, stripped=has_separators)
                rest, is_first = rest[cut:], False
        yield from _piece(rest, is_first, ends=True, stripped=has_separators)

    def _records(self, source: Source, kind: Kind) -> Iterator[Piece]:
        piece_length = self.limits.piece_length

        def columns(first_row: list[str]) -> tuple[str, ...] | None:
            return numbered_columns(first_row, (self.text_field,))

        records = records_of(source, columns, wanted=(self.text_field,), kind=kind, tell=self._note, column=self.text_field)
        for place, fields in records:
            text = self._decoded(self._text_in(fields, source, place))
            while len(text) > 2 * piece_length and (cut := last_cut(text[:piece_length])):
                yield Piece(text[:cut], ends=False)
                text = text[cut:]
            yield from _piece(text, True, ends=True, stripped=False)

    def _text_in(self, fields: Fields | BadRecord, source: Source, place: str) -> str:
        if isinstance(fields, BadRecord):
            raise DataError(f"{source.name}, {place}: {fields}: fix or remove it")
        if self.text_field not in fields:
            raise DataError(
                f"{source.name}, {place}: no field {self.text_field!r} (it has {', '.join(map(repr, fields)) or 'none'}): "
                "set text_field to the field with the text"
            )
        text = fields[self.text_field]
        if not isinstance(text, str):
            raise DataError(
                f"{source.name}, {place}: the field {self.text_field!r} is {type(text).__name__}, not a string: "
                "fix or remove it"
            )
        return text

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def _decoded(self, text: str) -> str:
        text, n_bytes = replaced(text)
        self.replaced_bytes += n_bytes
        if not text.isascii() and (halves := _SURROGATE.findall(text)):
            self.replaced_halves += len(halves)  # JSON's parser has joined the pairs
            return mend_surrogates(text)
        return text


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
    """Which text is for validation: whole documents, chosen by a hash, or the end of each document.

    The ends are taken if there are few documents, or if the hashes would leave one side without a document: copies of a
    document have the same hash, so they are on the same side. The hash covers the first half of `piece_length` characters.
    """

    fraction: float  # of the text, for validation
    cuts: tuple[int, ...] | None  # the ends of documents are taken: how many characters of each are for training

    @classmethod
    def of(cls, corpus: Corpus, fraction: float) -> Split:
        """Return the split of `corpus`. Reads only as many documents as it takes to see that each side has one."""
        lengths, sides, begins, is_validation = [0], set(), True, False
        for piece in corpus.pieces():
            if begins:
                is_validation = _is_for_validation(piece, corpus, fraction)
            begins = piece.ends
            lengths[-1] += len(piece.text)
            if piece.ends:
                sides.add(is_validation)
                lengths.append(0)
            if len(lengths) > _DOCUMENTS_TO_CHOOSE_FROM and len(sides) == 2:
                return cls(fraction, None)
        return cls(fraction, _cuts_of(lengths[:-1], fraction))

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
                is_validation = _is_for_validation(piece, corpus, self.fraction)
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


def _is_for_validation(first: Piece, corpus: Corpus, fraction: float) -> bool:
    start = first.text[: max(1, corpus.limits.piece_length // 2)].encode("utf-8", errors="surrogatepass")
    return zlib.crc32(start) < fraction * 2**32


def _cuts_of(lengths: Sequence[int], fraction: float) -> tuple[int, ...]:
    """Where to cut documents of these lengths, in characters, so that neither side is empty if there is a choice."""
    cuts = [int(length * (1 - fraction)) for length in lengths]
    if cuts and not any(cuts):  # documents of few characters, of which nothing would remain for training
        longest = lengths.index(max(lengths))
        if lengths[longest] > 1:
            cuts[longest] = 1
        else:
            cuts[:-1] = lengths[:-1]
    return tuple(cuts)
