"""ArrayEncoder: encode a long text in windows, or many texts at once. It knows neither the pattern nor the merge rule.

All pieces of a window are found at once, looked up in a table, and merged at once if they are new.
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

# A text with more bytes per character than this is in a script beyond ASCII.
_MOST_BYTES = 1.4
# Bytes per key of the two tables. One byte contains the length of the piece. Pieces of 32 bytes or more are rare.
_WIDTHS = (16, 32)
# Longer pieces, in bytes, are not cached.
_LONGEST_KNOWN = 1 << 10

# One lock for all encoders. A fork waits for it. Otherwise the child could inherit a lock that is never released, and tables
# that are half written.
_lock = Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


@dataclass(frozen=True)
class EncoderLimits:
    """How much is encoded at a time, and how much is cached. No limit changes the ids."""

    # Characters per window: the arrays nearly fit the processor's cache, and many new pieces are merged together.
    window: int = 1 << 18
    # The same for scripts with more bytes per character. Their arrays are larger, and fewer of their pieces are new. With
    # these shorter windows a first Thai text takes 25% less time, because of fewer page faults. English would take 33-50%
    # more time.
    window_beyond_ascii: int = 1 << 16
    # Characters at the start of a window that decide between the two lengths.
    sample: int = 1 << 12
    # Maximum total length of texts that are encoded together, in characters. The arrays take about 50 bytes per character.
    most_together: int = 1 << 21
    # Characters beyond ASCII, in all texts so far, from which on CharacterCuts repays the time to build its tables.
    worth_cuts: int = 1 << 10
    # Fewer new pieces than this are merged faster one by one.
    worth_batch: int = 128
    # Maximum pieces per table. If a table or the pool is full, all are cleared, because counting uses would cost more.
    max_pieces: int = 1 << 18
    # Maximum ids in the pool.
    max_ids: int = 1 << 22
    # Maximum pieces per look-up.
    max_pieces_at_once: int = 1 << 17
    # Initial capacity of the pool, in ids.
    first_ids: int = 1 << 16


_DEFAULT_LIMITS = EncoderLimits()


class Remembered(NamedTuple):
    """The size of an encoder's cache."""

    n_pieces: int  # in the fullest table
    n_long_pieces: int  # pieces that are too long for the tables
    id_capacity: int  # ids for which memory is allocated


class ArrayEncoder:
    """Encodes long texts and caches their pieces. Several threads may use it; a lock admits one at a time."""

    def __init__(
        self,
        cutter: TextCutter,
        merge_one: MergeOne,
        merge_many: BatchMerger,
        limits: EncoderLimits = _DEFAULT_LIMITS,
    ) -> None:
        """`merge_one` returns the ids of one piece, `merge_many` those of many pieces."""
        self._cutter = cutter
        self._merge_one = merge_one
        self._limits = limits
        self._pool = IdPool(limits.first_ids)
        self._tables = [
            PieceTable(width, limits.max_pieces, self._pool, merge_one, merge_many, worth_batch=limits.worth_batch)
            for width in _WIDTHS
        ]
        self._long_pieces: dict[bytes, tuple[int, int]] = {}
        # Lists refer to these int objects. That is faster than creating new ones and takes 80% less memory.
        self._int_of_id = np.arange(merge_many.n_ids).astype(object)

    @classmethod
    def of(
        cls,
        merger: BytePairMerger,
        byte_ids: Sequence[int],
        tokens: Tokens,
        limits: EncoderLimits = _DEFAULT_LIMITS,
    ) -> ArrayEncoder | None:
        """The encoder with the merges of `merger`. None if BatchMerger does not support them.

        `byte_ids`: the ids of the 256 bytes; `tokens` as in TextCutter.
        """
        merge_many = BatchMerger.of(merger.ranks, merger.merged_ids, byte_ids)
        if merge_many is None:
            return None
        cutter = TextCutter(tokens, limits.worth_cuts)
        return cls(cutter, lambda piece: merger.merge([byte_ids[byte] for byte in piece]), merge_many, limits)

    @property
    def remembered(self) -> Remembered:
        """The current size of the cache."""
        n_pieces = max(table.n_pieces for table in self._tables)
        return Remembered(n_pieces, len(self._long_pieces), self._pool.capacity)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Raises UnicodeEncodeError for a surrogate."""
        windows = list(self._encode(text))
        if len(windows) == 1:
            only: list[int] = self._int_of_id.take(windows[0]).tolist()
            return only
        ids = [0] * sum(map(len, windows))  # the final length: growth of the list would take 8% of the time
        end = 0
        for window in windows:
            begin, end = end, end + len(window)
            ids[begin:end] = self._int_of_id.take(window).tolist()
        return ids

    def encode_packed(self, text: str) -> bytes:
        """The ids of `text` as the bytes of an array of 32-bit unsigned ints. Raises UnicodeEncodeError for a surrogate."""
        return b"".join(part.tobytes() for part in self._encode(text))

    def encode_each_packed(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as from `encode_packed`. Raises UnicodeEncodeError for a surrogate.

        Several texts are encoded together if their total length is at most `most_together` characters.
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
        """The ids of each text as a list. `packed`: the ids of all texts, packed; `counts`: the number of ids per text."""
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
        """The ids of all parts, concatenated, and the number of ids of each part."""
        at_once = self._limits.max_pieces_at_once
        slices = [slice(begin, begin + at_once) for begin in range(0, len(parts.begins), at_once)]
        try:
            encoded = [self._encode_some(parts.some(few)) for few in slices]
        except BaseException:  # such as Ctrl-C: a table may then contain pieces without ids
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
    """The characters per window of a text that begins with `sample`. Raises UnicodeEncodeError for a surrogate."""
    is_mostly_ascii = len(sample.encode("utf-8")) <= _MOST_BYTES * len(sample)
    return limits.window if is_mostly_ascii else limits.window_beyond_ascii
