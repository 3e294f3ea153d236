"""BatchMerger: merge many pieces at once, with the same ids as BytePairMerger. It knows only ids and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from gpt_encoder.arrays import Bytes, Ids, Numbers, from_list
from gpt_encoder.arrays.pair_ranks import ID_BITS, UNRANKED, PairRanks
from gpt_encoder.byte_pair import Pair

# Pieces per batch. Pieces are sorted by length first, because a short piece in a batch of long ones is mostly padding.
_TOGETHER = 2048

# A rank and the position of its pair are packed into one number. The minimum is the leftmost pair of the lowest rank.
_POSITION_BITS = 5
_NO_PAIR = UNRANKED << _POSITION_BITS
_GONE = -1


class BatchMerger:
    """The merges of one vocabulary, for pieces of at most 31 bytes. All ids are below `n_ids`."""

    def __init__(self, left: Numbers, right: Numbers, ranks: Numbers, merged_ids: Numbers, byte_ids: Numbers) -> None:
        """`left`, `right` and `ranks` (N,) are pairs of ids and their ranks. `merged_ids[rank]` is the id of the merged
        pair. `byte_ids` (256,) are the ids of the bytes, all different.
        """
        self.n_ids = 1 + max(int(ids.max(initial=0)) for ids in (left, right, merged_ids, byte_ids))
        self._ranks, self._merged_ids, self._byte_ids = PairRanks(left, right, ranks), merged_ids, byte_ids
        byte_of_id = np.full(self.n_ids, -1)
        byte_of_id[byte_ids] = np.arange(256)
        of_bytes = (byte_of_id[left] >= 0) & (byte_of_id[right] >= 0)
        self._rank_of_bytes = np.full((256, 256), UNRANKED)
        self._rank_of_bytes[byte_of_id[left[of_bytes]], byte_of_id[right[of_bytes]]] = ranks[of_bytes]

    @classmethod
    def of(cls, ranks: Mapping[Pair, int], merged_ids: Sequence[int], byte_ids: Sequence[int]) -> BatchMerger | None:
        """The merges of a BytePairMerger, or None if BatchMerger does not support them. `byte_ids`: the ids of the bytes.

        Each round merges one pair per piece, whereas the rule merges all pairs of one rank. The results are equal if no pair
        has a lower rank than a merge that makes one of its ids: then no new pair precedes the remaining pairs of the rank
        that made it. Every learned vocabulary meets this condition.

        The result is also None if an id is not an int, negative or too large for the tables, if there are too many ranks, or
        if two bytes have the same id.
        """
        try:
            pairs = from_list(list(chain.from_iterable(ranks))).astype(np.int64)
            numbers = (from_list(list(ints)).astype(np.int64) for ints in (ranks.values(), merged_ids, byte_ids))
            rank_of_pair, merged, of_bytes = numbers
        except (OverflowError, TypeError):
            return None
        left, right = pairs.reshape(-1, 2).T
        largest = max(int(ids.max(initial=0)) for ids in (left, right, merged, of_bytes))
        if largest >= 1 << ID_BITS or len(merged) > UNRANKED or len(set(byte_ids)) < len(byte_ids):
            return None
        made_at = np.full(largest + 1, -1, np.int32)
        made_at[merged] = np.arange(len(merged))
        if (rank_of_pair <= np.maximum(made_at[left], made_at[right])).any():
            return None
        return cls(left, right, rank_of_pair, merged, of_bytes)

    def merge(self, data: Bytes, lengths: Numbers) -> tuple[Ids, Numbers]:
        """The ids of all pieces, concatenated, and the number of ids of each piece (N,).

        `data` (N, up to 31) are the bytes of the pieces, `lengths` (N,) their numbers of bytes.
        """
        merged = np.full(data.shape, _GONE, np.int32)
        by_length = np.argsort(lengths)
        for start in range(0, len(lengths), _TOGETHER):
            rows = by_length[start : start + _TOGETHER]
            longest = lengths[rows[-1]]
            merged[rows, :longest] = self._merge(np.ascontiguousarray(data[rows, :longest].T), lengths[rows]).T
        is_left = merged != _GONE
        return merged[is_left], np.count_nonzero(is_left, axis=1)

    def _merge(self, data: Bytes, lengths: Numbers) -> Numbers:
        """The ids (L, N) of the pieces in `data` (L, N), one piece per column. An id is in the row of its first byte; all
        other elements are _GONE.

        Each round applies the next merge of each piece. Ids keep their rows: `before` and `after` contain the row of the
        previous and the next id of the column. The index in a flat array is `row * N + column`.
        """
        length, n_pieces = data.shape
        outside = np.arange(length)[:, None] >= lengths
        ids = np.full((length + 2, n_pieces), self.n_ids)  # n_ids is in no pair; it is the padding before and after a piece
        ids[1:-1] = np.where(outside, self.n_ids, self._byte_ids.take(data))
        pairs = np.full((length + 1, n_pieces), _NO_PAIR)
        ranks = self._rank_of_bytes.take(data[:-1].astype(np.uint16) << 8 | data[1:])
        pairs[1:-1] = np.where(outside[1:], _NO_PAIR, ranks << _POSITION_BITS | np.arange(1, length)[:, None])
        before = np.repeat(np.arange(-1, length + 1), n_pieces)
        after = np.repeat(np.arange(1, length + 3), n_pieces)
        flat_ids, flat_pairs = ids.reshape(-1), pairs.reshape(-1)
        while True:
            best = pairs.min(axis=0)
            column = np.flatnonzero(best < _NO_PAIR)
            if not len(column):
                ids[1:-1][outside] = _GONE
                return ids[1:-1]
            best = best.take(column)
            row = best & (1 << _POSITION_BITS) - 1
            place = row * n_pieces + column
            gone = after.take(place) * n_pieces + column
            row_before, row_after = before.take(place), after.take(gone)
            place_before, place_after = row_before * n_pieces + column, row_after * n_pieces + column
            new = np.empty((3, len(column)), np.int64)
            new[0] = flat_ids.take(place_before)
            new[1] = flat_ids[place] = self._merged_ids.take(best >> _POSITION_BITS)
            new[2] = flat_ids.take(place_after)
            flat_ids[gone] = _GONE
            flat_pairs[gone] = _NO_PAIR
            after[place], before[place_after] = row_after, row
            ranks = self._ranks.of(new[:-1], new[1:]) << _POSITION_BITS
            flat_pairs[place_before] = ranks[0] | row_before
            flat_pairs[place] = ranks[1] | row
