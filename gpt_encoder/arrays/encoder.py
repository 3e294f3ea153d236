"""ArrayEncoder: texts to ids, a window of text at a time, or many texts. It knows neither the pattern nor the merge rule.

A window is cut into pieces in one go, each piece is looked up in a table, and what is new is merged in one go.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from threading import Lock
from typing import NamedTuple

import numpy as np

from gpt_encoder.arrays import Ids, Numbers
from gpt_encoder.arrays.batch_merger import BatchMerger
from gpt_encoder.arrays.piece_table import IdPool, MergeOne, PieceTable
from gpt_encoder.arrays.text_cutter import Parts, TextCutter, Tokens
from gpt_encoder.byte_pair import BytePairMerger

# Bytes per character: a text with more is of a script beyond ASCII.
_MOST_BYTES = 1.4
# Bytes of the pieces that the tables hold, less one that holds the length. Longer ones are rare.
_WIDTHS = (16, 32)
# Bytes of the longest piece that is remembered.
_LONGEST_KNOWN = 1 << 10

# One lock for all encoders. A fork waits for it: else the child would have it locked for ever, and tables half written.
_lock = Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


@dataclass(frozen=True)
class EncoderLimits:
    """How much is worked on at a time, and how much is remembered. No limit changes the ids."""

    # Characters worked on at a time: the arrays nearly fit the processor's cache, and many new pieces are merged together.
    window: int = 1 << 18
    # The same for scripts with more bytes per character. Their arrays are larger, and fewer of their pieces are new: a first
    # Thai text takes three quarters of the time in shorter windows, because of fewer page faults. English would take a third
    # to a half longer.
    window_beyond_ascii: int = 1 << 16
    # Characters at the start of a window that tell which of the two it is.
    sample: int = 1 << 12
    # Characters of several texts that are worked on together. Their arrays take about 50 bytes per character.
    most_together: int = 1 << 21
    # For fewer characters beyond ASCII, in all texts so far, CharacterCuts does not repay making its tables.
    worth_cuts: int = 1 << 10
    # Fewer new pieces than this are merged faster one by one.
    worth_batch: int = 128
    # Pieces in one table, and ids in the pool. When either is full, both start again: counting uses would cost more.
    max_pieces: int = 1 << 18
    max_ids: int = 1 << 22
    # Pieces that are looked up together.
    max_pieces_at_once: int = 1 << 17
    # Ids that the pool has room for at first.
    first_ids: int = 1 << 16


_DEFAULT_LIMITS = EncoderLimits()


class Remembered(NamedTuple):
    """What an encoder keeps: pieces (of its tables the fullest), pieces too long for the tables, and room for ids."""

    n_pieces: int
    n_long_pieces: int
    id_capacity: int


class ArrayEncoder:
    """Encodes long texts, and remembers the pieces that came up. Several threads may use it, one after the other."""

    def __init__(
        self,
        cutter: TextCutter,
        merge_one: MergeOne,
        merge_many: BatchMerger,
        limits: EncoderLimits = _DEFAULT_LIMITS,
    ) -> None:
        """`merge_one` gives the ids of one piece, `merge_many` of many."""
        self._cutter = cutter
        self._merge_one = merge_one
        self._limits = limits
        self._pool = IdPool(limits.first_ids)
        self._tables = [
            PieceTable(width, limits.max_pieces, self._pool, merge_one, merge_many, worth_batch=limits.worth_batch)
            for width in _WIDTHS
        ]
        self._long_pieces: dict[bytes, tuple[int, int]] = {}
        # Lists are made of ints that are here, which is sooner done than to make new ones, and takes a fifth of the memory.
        self._int_of_id = np.arange(merge_many.n_ids).astype(object)

    @classmethod
    def of(
        cls,
        merger: BytePairMerger,
        byte_ids: Sequence[int],
        tokens: Tokens,
        limits: EncoderLimits = _DEFAULT_LIMITS,
    ) -> ArrayEncoder | None:
        """The encoder that gives the ids of `merger`; None for merges that BatchMerger does not take.

        `byte_ids`: the id of each of the 256 bytes; `tokens` as in TextCutter.
        """
        merge_many = BatchMerger.of(merger.ranks, merger.merged_ids, byte_ids)
        if merge_many is None:
            return None
        cutter = TextCutter(tokens, limits.worth_cuts)
        return cls(cutter, lambda piece: merger.merge([byte_ids[byte] for byte in piece]), merge_many, limits)

    @property
    def remembered(self) -> Remembered:
        """How much is kept at the moment."""
        n_pieces = max(table.n_pieces for table in self._tables)
        return Remembered(n_pieces, len(self._long_pieces), self._pool.capacity)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. UnicodeEncodeError for a surrogate."""
        windows = list(self._encode(text))
        if len(windows) == 1:
            only: list[int] = self._int_of_id.take(windows[0]).tolist()
            return only
        ids = [0] * sum(map(len, windows))  # as long as it will be: a twelfth of the time would go into its growth
        end = 0
        for window in windows:
            begin, end = end, end + len(window)
            ids[begin:end] = self._int_of_id.take(window).tolist()
        return ids

    def encode_packed(self, text: str) -> bytes:
        """The same ids as the bytes of an array of 32-bit unsigned ints."""
        return b"".join(part.tobytes() for part in self._encode(text))

    def encode_each_packed(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each of `texts`, packed. UnicodeEncodeError for a surrogate.

        Several texts are worked on together if they have at most `most_together` characters in all.
        """
        if len(texts) == 1 or sum(map(len, texts)) > self._limits.most_together:
            return list(map(self.encode_packed, texts))
        with _lock:
            parts, n_parts = self._cutter.cut_texts(texts)
            ids, counts = self._encode_parts(parts)
        ends_of_parts = np.append(0, np.cumsum(counts))
        ends = ends_of_parts[np.append(0, np.cumsum(n_parts))].tolist()
        return [ids[start:end].tobytes() for start, end in pairwise(ends)]

    def unpack_each(self, packed: bytes | memoryview, counts: Sequence[int]) -> list[list[int]]:
        """The ids of each of some texts as a list, from those of all, packed, and how many each has."""
        ints = self._int_of_id.take(np.frombuffer(packed, np.int32))
        return [ints[begin:end].tolist() for begin, end in pairwise(accumulate(counts, initial=0))]

    def _encode(self, text: str) -> Iterator[Ids]:
        limits = self._limits
        start, factor = 0, 1
        while start < len(text):
            length = factor * _window(text[start : start + limits.sample], limits)
            window = text[start : start + length]
            with _lock:
                parts, n_characters = self._cutter.cut_window(window, is_last=start + length >= len(text))
                ids, _ = self._encode_parts(parts)
            yield ids
            start += n_characters
            factor = 1 if n_characters else 2 * factor  # one piece may be longer than a window

    def _encode_parts(self, parts: Parts) -> tuple[Ids, Numbers]:
        """The ids of all parts, one after the other, and how many of each part."""
        at_once = self._limits.max_pieces_at_once
        slices = [slice(begin, begin + at_once) for begin in range(0, len(parts.begins), at_once)]
        try:
            encoded = [self._encode_some(parts.some(few)) for few in slices]
        except BaseException:  # as Ctrl-C is: a table may hold pieces whose ids it does not have yet
            self._forget()
            raise
        if len(encoded) == 1:
            return encoded[0]
        none = np.empty(0, np.int32), np.empty(0, np.int64)
        ids, counts = zip(none, *encoded, strict=True)
        return np.concatenate(ids), np.concatenate(counts)

    def _encode_some(self, pieces: Parts) -> tuple[Ids, Numbers]:
        self._make_room(len(pieces.begins))
        narrow, wide = self._tables
        offsets, counts = narrow.find(pieces)
        longer: Numbers = np.flatnonzero(pieces.lengths >= narrow.width)
        if len(longer):
            long_pieces = pieces.some(longer)
            offsets[longer], counts[longer] = wide.find(long_pieces)
            for piece in longer[long_pieces.lengths >= wide.width].tolist():
                begin, length = int(pieces.begins[piece]), int(pieces.lengths[piece])
                offsets[piece], counts[piece] = self._find_very_long(pieces.data[begin : begin + length])
        return self._pool.gather(offsets, counts), counts

    def _find_very_long(self, piece: bytes) -> tuple[int, int]:
        found = self._long_pieces.get(piece)
        if found is None:
            ids = np.array(self._merge_one(piece), np.int32)
            found = self._pool.add(ids), len(ids)
            if len(piece) <= _LONGEST_KNOWN:
                self._long_pieces[piece] = found
        return found

    def _make_room(self, n_pieces: int) -> None:
        known = max(len(self._long_pieces), *(table.n_pieces for table in self._tables))
        if known + n_pieces > self._limits.max_pieces or self._pool.size > self._limits.max_ids:
            self._forget()

    def _forget(self) -> None:
        for table in self._tables:
            table.clear()
        self._long_pieces.clear()
        self._pool.clear()


def _window(sample: str, limits: EncoderLimits) -> int:
    """How many characters, of a text like `sample`, are worked on at a time. UnicodeEncodeError for a surrogate."""
    is_mostly_ascii = len(sample.encode("utf-8")) <= _MOST_BYTES * len(sample)
    return limits.window if is_mostly_ascii else limits.window_beyond_ascii
