"""PieceTable: look up the ids of many pieces at once. It knows nothing of text or of how a piece is merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np

from gpt_encoder.arrays import Ids, Numbers, Words
from gpt_encoder.arrays.batch_merger import BatchMerger
from gpt_encoder.arrays.hash_table import HashTable
from gpt_encoder.arrays.text_cutter import Parts

MergeOne: TypeAlias = Callable[[bytes], Sequence[int]]


class IdPool:
    """The ids of all cached pieces, concatenated. The initial capacity is `first_capacity` ids."""

    def __init__(self, first_capacity: int) -> None:
        self._first_capacity = first_capacity
        self.clear()

    @property
    def capacity(self) -> int:
        """The number of ids that fit into the allocated memory."""
        return len(self._ids)

    def clear(self) -> None:
        """Remove all ids and reset the capacity, because a very long piece may have raised it."""
        self._ids = np.empty(self._first_capacity, np.int32)
        self.size = 0

    def add(self, ids: Ids) -> int:
        """Append `ids`. Returns their offset in the pool."""
        offset, self.size = self.size, self.size + len(ids)
        if self.size > len(self._ids):
            self._ids = np.append(self._ids[:offset], np.empty(self.size, np.int32))
        self._ids[offset : self.size] = ids
        return offset

    def gather(self, offsets: Numbers, counts: Numbers) -> Ids:
        """The ids at `offsets[i]` to `offsets[i] + counts[i] - 1` for each i, concatenated."""
        begins = np.cumsum(counts) - counts
        places = np.repeat(offsets - begins, counts)
        places += np.arange(len(places))
        return self._ids.take(places)


class PieceTable:
    """A table of at most `max_pieces` pieces of less than `width` bytes, with the offsets of their ids in `pool`.

    New pieces are merged: fewer than `worth_batch` one by one by `merge_one`, more of them together by `merge_many`.
    """

    def __init__(
        self, width: int, max_pieces: int, pool: IdPool, merge_one: MergeOne, merge_many: BatchMerger, *, worth_batch: int
    ) -> None:
        self.width = width
        self._worth_batch = worth_batch
        self._pool = pool
        self._merge_one = merge_one
        self._merge_many = merge_many
        self._table = HashTable(width // 8, max_pieces)
        self._offsets = np.empty(max_pieces + 1, np.int64)
        self._counts = np.empty(max_pieces + 1, np.int64)
        # A key is the bytes of the piece, padded with zeros, and the length in the last byte. A longer piece has the key of
        # the empty piece.
        keep = np.zeros((width + 1, width), np.uint8)
        for length in range(width):
            keep[length, :length] = 0xFF
        length_mark = np.zeros((width + 1, width), np.uint8)
        length_mark[:width, -1] = np.arange(width)
        self._keep = np.ascontiguousarray(keep.view(np.uint64).T)
        self._length_mark = np.ascontiguousarray(length_mark.view(np.uint64)[:, -1])

    @property
    def n_pieces(self) -> int:
        """The number of pieces in the table."""
        return self._table.n_keys

    def clear(self) -> None:
        """Remove all pieces."""
        self._table.clear()

    def find(self, pieces: Parts) -> tuple[Numbers, Numbers]:
        """The offset of the ids of each piece in the pool, and their number, each (N,). A piece that is too long has 0 ids.

        New pieces are merged and added; the table must have room for them.
        """
        known = self._table.n_keys
        numbers = self._table.find_or_add(self._keys(pieces))
        if self._table.n_keys > known:
            self._learn(np.arange(known + 1, self._table.n_keys + 1))
        return self._offsets.take(numbers), self._counts.take(numbers)

    def _keys(self, pieces: Parts) -> list[Words]:
        every_place = np.ndarray((len(pieces.data),), f"V{self.width}", buffer=pieces.data + bytes(self.width), strides=(1,))
        words = every_place[pieces.begins].view(np.uint64).reshape(len(pieces.begins), -1)
        lengths = np.minimum(pieces.lengths, self.width)
        keys = [words[:, at] & keep.take(lengths) for at, keep in enumerate(self._keep)]
        keys[-1] |= self._length_mark.take(lengths)
        return keys

    def _learn(self, numbers: Numbers) -> None:
        keys = np.stack([column[numbers] for column in self._table.keys], axis=1).view(np.uint8)
        lengths = keys[:, -1].astype(np.int64)
        if len(numbers) < self._worth_batch:
            pieces = [key[:length] for key, length in zip(map(bytes, keys), lengths.tolist(), strict=True)]
            rows = list(map(self._merge_one, pieces))
            ids, counts = np.array(list(chain.from_iterable(rows)), np.int32), np.array(list(map(len, rows)), np.int64)
        else:
            ids, counts = self._merge_many.merge(keys[:, :-1], lengths)
        self._counts[numbers] = counts
        self._offsets[numbers] = self._pool.add(ids) + np.cumsum(counts) - counts
