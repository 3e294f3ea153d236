"""ArrayEncoder: text to ids, a window of it at a time. It knows pieces and their numbers, not the merge rule.

A window is cut into pieces in one go, each piece is looked up in a hash table, and what is new is merged in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from threading import Lock
from typing import TypeAlias

import numpy as np

from gpt_encoder.arrays.batch_merger import BatchMerger, Ids, Lengths
from gpt_encoder.arrays.character_cuts import CharacterCuts
from gpt_encoder.arrays.hash_table import HashTable, Numbers, Words
from gpt_encoder.arrays.piece_starts import LOOK_AHEAD, Flags, piece_starts
from gpt_encoder.byte_pair import BytePairMerger

# So many characters are worked on at a time: the arrays fit the processor's cache, and new pieces are many at once.
_WINDOW = 1 << 19
# A table holds so many pieces; a full one is emptied, for to keep count of uses would cost more than to fill it anew.
_MAX_PIECES = 1 << 18
_MAX_PIECES_AT_ONCE = 1 << 17
_MAX_POOL = 1 << 22
# Ids are made into ints by way of a table of all of them.
_MAX_IDS = 1 << 20
# Bytes of the pieces that the tables hold, less one that holds the length. Longer ones are rare.
_WIDTHS = (16, 32)
# Fewer new pieces than this are merged sooner one by one.
_WORTH_BATCH = 128

_EVERY_ASCII = bytes(range(0x80))

MergeOne: TypeAlias = Callable[[bytes], Sequence[int]]
Tokens: TypeAlias = Callable[[], Iterable[bytes]]


class ArrayEncoder:
    """Encodes long texts, and remembers the pieces that came up. Several threads may use it, one after the other."""

    def __init__(self, merge_one: MergeOne, merge_many: BatchMerger, tokens: Tokens, n_ids: int) -> None:
        """`merge_one` gives the ids of one piece, `merge_many` of many, all below `n_ids`; `tokens`: the bytes of all tokens
        beyond ASCII that merges make, asked for when there is text beyond ASCII."""
        self._merge_one = merge_one
        self._pool = _IdPool()
        self._tables = [_PieceTable(width, self._pool, merge_one, merge_many) for width in _WIDTHS]
        self._long_pieces: dict[bytes, tuple[int, int]] = {}
        self._tokens = tokens
        self._cuts: CharacterCuts | None = None
        self._int_of_id = np.array(range(n_ids), object)
        self._lock = Lock()

    @classmethod
    def of(cls, merger: BytePairMerger, byte_ids: Sequence[int], tokens: Tokens) -> ArrayEncoder | None:
        """The encoder that gives the ids of `merger`; None for ids or an order of merges that no one learned."""
        n_ids = 1 + max([*byte_ids, *merger.merged_ids])
        if n_ids > _MAX_IDS:
            return None
        merge_many = BatchMerger(merger.ranks, merger.merged_ids, byte_ids)
        if not merge_many.is_exact:
            return None
        return cls(lambda piece: merger.merge([byte_ids[byte] for byte in piece]), merge_many, tokens, n_ids)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. UnicodeEncodeError for a surrogate."""
        ids: list[int] = []
        for part in self._encode(text):
            ids += self._int_of_id.take(part).tolist()  # ints that are there already, which is faster than to make new ones
        return ids

    def encode_packed(self, text: str) -> bytes:
        """The same ids as the bytes of an array of 32-bit unsigned ints."""
        return b"".join(part.tobytes() for part in self._encode(text))

    def _encode(self, text: str) -> Iterator[Ids]:
        start, length = 0, _WINDOW
        while start < len(text):
            window = text[start : start + length]
            with self._lock:
                data, starts, n_characters = self._cut(window, is_last=start + length >= len(text))
                parts = [self._encode_pieces(data, some) for some in _slices(starts)] if n_characters else []
            yield from parts
            start += n_characters
            length = _WINDOW if n_characters else 2 * length  # one piece may be longer than a window

    def _cut(self, window: str, is_last: bool) -> tuple[bytes, Numbers, int]:
        """The bytes of `window`, where its parts begin (and the last one ends), and how many characters they are.

        Unless it is the last window its last piece is left to the next, for what follows may lengthen it.
        """
        data = window.encode("utf-8")
        every_byte = first_bytes = np.frombuffer(data, np.uint8)
        begins_character = None if window.isascii() else every_byte & 0xC0 != 0x80
        points = np.empty(0, np.uint32)
        if begins_character is not None:
            first_bytes = every_byte[begins_character]
            points = np.frombuffer(data.translate(None, _EVERY_ASCII).decode("utf-8").encode("utf-32-le"), "<u4")
        starts: Flags = piece_starts(first_bytes, points)
        n_characters = len(window) if is_last else _last_sure(starts)
        n_bytes = n_characters
        if begins_character is not None:
            if self._cuts is None:
                self._cuts = CharacterCuts(self._tokens())
            self._cuts.cut(starts, first_bytes, points)
            n_bytes = len(window[:n_characters].encode("utf-8"))
            character_starts, starts = starts, np.zeros(len(data), np.bool_)
            starts[begins_character] = character_starts
        return data, np.append(np.flatnonzero(starts[:n_bytes]), n_bytes), n_characters

    def _encode_pieces(self, data: bytes, starts: Numbers) -> Ids:
        """The ids of the pieces of `data` that begin at all but the last of `starts`, where the last one ends."""
        self._make_room(len(starts))
        lengths = np.diff(starts)
        starts = starts[:-1]
        narrow, wide = self._tables
        offsets, counts = narrow.find(data, starts, lengths)
        longer: Numbers = np.flatnonzero(lengths >= narrow.width)
        if len(longer):
            offsets[longer], counts[longer] = wide.find(data, starts[longer], lengths[longer])
            for piece in longer[lengths[longer] >= wide.width].tolist():
                start = int(starts[piece])
                offsets[piece], counts[piece] = self._find_long(data[start : start + int(lengths[piece])])
        return self._pool.gather(offsets, counts)

    def _find_long(self, piece: bytes) -> tuple[int, int]:
        found = self._long_pieces.get(piece)
        if found is None:
            ids = np.array(self._merge_one(piece), np.int32)
            found = self._long_pieces[piece] = self._pool.add(ids), len(ids)
        return found

    def _make_room(self, n_pieces: int) -> None:
        known = max(len(self._long_pieces), *(table.n_pieces for table in self._tables))
        if known + n_pieces > _MAX_PIECES or self._pool.size > _MAX_POOL:
            for table in self._tables:
                table.clear()
            self._long_pieces.clear()
            self._pool.clear()


class _IdPool:
    """The ids of all known pieces, one after the other."""

    def __init__(self) -> None:
        self._ids = np.empty(1 << 16, np.int32)
        self.size = 0

    def clear(self) -> None:
        self.size = 0

    def add(self, ids: Ids) -> int:
        """Where `ids` begin now."""
        offset, self.size = self.size, self.size + len(ids)
        if self.size > len(self._ids):
            self._ids = np.append(self._ids[:offset], np.empty(self.size, np.int32))
        self._ids[offset : self.size] = ids
        return offset

    def gather(self, offsets: Numbers, counts: Lengths) -> Ids:
        """`counts[i]` ids from `offsets[i]` on, for each i."""
        begins = np.cumsum(counts) - counts
        places = np.repeat(offsets - begins, counts)
        places += np.arange(len(places))
        return self._ids.take(places)


class _PieceTable:
    """Pieces of less than `width` bytes, and where their ids are in the pool."""

    def __init__(self, width: int, pool: _IdPool, merge_one: MergeOne, merge_many: BatchMerger) -> None:
        self.width = width
        self._pool = pool
        self._merge_one = merge_one
        self._merge_many = merge_many
        self._table = HashTable(width // 8, _MAX_PIECES)
        self._offsets = np.zeros(_MAX_PIECES + 1, np.int64)
        self._counts = np.zeros(_MAX_PIECES + 1, np.int64)
        # A key is the bytes of the piece, then zeros, and in the last byte the length; nothing at all if it is too long.
        keep = np.zeros((width + 1, width), np.uint8)
        for length in range(width):
            keep[length, :length] = 0xFF
        length_mark = np.zeros((width + 1, width), np.uint8)
        length_mark[:width, -1] = np.arange(width)
        self._keep = np.ascontiguousarray(keep.view(np.uint64).T)
        self._length_mark = np.ascontiguousarray(length_mark.view(np.uint64)[:, -1])

    @property
    def n_pieces(self) -> int:
        """How many pieces are known."""
        return self._table.n_keys

    def clear(self) -> None:
        """Forget all pieces."""
        self._table.clear()

    def find(self, data: bytes, starts: Numbers, lengths: Lengths) -> tuple[Numbers, Lengths]:
        """Where the ids of pieces begin in the pool, and how many they are; for pieces that are too long, nothing of use."""
        known = self._table.n_keys
        numbers = self._table.find_or_add(self._keys(data, starts, lengths))
        if self._table.n_keys > known:
            self._learn(np.arange(known + 1, self._table.n_keys + 1))
        return self._offsets.take(numbers), self._counts.take(numbers)

    def _keys(self, data: bytes, starts: Numbers, lengths: Lengths) -> list[Words]:
        every = np.ndarray((len(data),), f"V{self.width}", buffer=data + bytes(self.width), strides=(1,))
        words = every[starts].view(np.uint64).reshape(len(starts), -1)
        lengths = np.minimum(lengths, self.width)
        keys = [words[:, at] & keep.take(lengths) for at, keep in enumerate(self._keep)]
        keys[-1] |= self._length_mark.take(lengths)
        return keys

    def _learn(self, numbers: Numbers) -> None:
        keys = np.ascontiguousarray(self._table.keys[:, numbers].T).view(np.uint8)
        lengths = keys[:, -1].astype(np.int64)
        if len(numbers) < _WORTH_BATCH:
            pieces = [key[:length] for key, length in zip(map(bytes, keys), lengths.tolist(), strict=True)]
            rows = list(map(self._merge_one, pieces))
            ids, counts = np.array(list(chain.from_iterable(rows)), np.int32), np.array(list(map(len, rows)), np.int64)
        else:
            ids, counts = self._merge_many.merge(keys[:, :-1], lengths)
        self._counts[numbers] = counts
        self._offsets[numbers] = self._pool.add(ids) + np.cumsum(counts) - counts


def _slices(starts: Numbers) -> Iterator[Numbers]:
    """`starts` in parts of _MAX_PIECES_AT_ONCE pieces; each ends where the next begins."""
    return (starts[at : at + _MAX_PIECES_AT_ONCE + 1] for at in range(0, len(starts) - 1, _MAX_PIECES_AT_ONCE))


def _last_sure(starts: Flags) -> int:
    """The last of `starts` that is one whatever follows the text; 0 if there is none."""
    sure = starts[:-LOOK_AHEAD]
    return len(sure) - 1 - int(np.argmax(sure[::-1])) if len(sure) else 0
