"""BatchMerger: merge many pieces at once. It knows ids and ranks, and gives what BytePairMerger gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from gpt_encoder.arrays import Bytes, Ids, Numbers, from_list
from gpt_encoder.arrays.pair_ranks import ID_BITS, UNRANKED, PairRanks
from gpt_encoder.byte_pair import Pair

# So many pieces are merged together, of lengths as like as can be, for a short one among long ones is mostly padding.
_TOGETHER = 2048

# A rank and the position of its pair in one number: the least of them is the leftmost of the lowest rank.
_POSITION_BITS = 5
_NO_PAIR = UNRANKED << _POSITION_BITS
_GONE = -1


class BatchMerger:
    """The merges of one vocabulary, for pieces of at most 31 bytes. All ids are below `n_ids`."""

    def __init__(self, left: Numbers, right: Numbers, ranks: Numbers, merged_ids: Numbers, byte_ids: Numbers) -> None:
        """Pairs of ids `left` and `right` with their `ranks`, all (N,); the ids that ranks make; those of the 256 bytes, of
        which no two are alike.
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
        """The merges of a BytePairMerger; `byte_ids`: the id of each of the 256 bytes.

        None where they do not fit: pairs are merged one at a time here, and the rule merges all of one rank. It is the same
        where no pair ranks before a merge that makes one of its ids, for then no new pair comes before the others of the
        rank that made it. So it is in every vocabulary that was ever learned. None also for ids that no table could have,
        and for bytes that share one.
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
        """The ids of pieces, one after the other, and how many of each. `data`: (N, 31 or less) bytes; `lengths`: (N,)."""
        merged = np.full(data.shape, _GONE, np.int32)
        by_length = np.argsort(lengths)
        for start in range(0, len(lengths), _TOGETHER):
            rows = by_length[start : start + _TOGETHER]
            longest = lengths[rows[-1]]
            merged[rows, :longest] = self._merge(np.ascontiguousarray(data[rows, :longest].T), lengths[rows]).T
        is_left = merged != _GONE
        return merged[is_left], np.count_nonzero(is_left, axis=1)

    def _merge(self, data: Bytes, lengths: Numbers) -> Numbers:
        """The ids of `data` (L, N), a piece a column: each where its first byte was, and _GONE elsewhere.

        Each round makes the next merge of each piece. Nothing is moved up: `before` and `behind` say which row of the
        column holds the next id. A place in a flat array is `row * N + column`.
        """
        length, n_pieces = data.shape
        outside = np.arange(length)[:, None] >= lengths
        ids = np.full((length + 2, n_pieces), self.n_ids)  # which is in no pair: in front of the piece and behind
        ids[1:-1] = np.where(outside, self.n_ids, self._byte_ids.take(data))
        pairs = np.full((length + 1, n_pieces), _NO_PAIR)
        ranks = self._rank_of_bytes.take(data[:-1].astype(np.uint16) << 8 | data[1:])
        pairs[1:-1] = np.where(outside[1:], _NO_PAIR, ranks << _POSITION_BITS | np.arange(1, length)[:, None])
        before = np.repeat(np.arange(-1, length + 1), n_pieces)
        behind = np.repeat(np.arange(1, length + 3), n_pieces)
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
            gone = behind.take(place) * n_pieces + column
            row_before, row_behind = before.take(place), behind.take(gone)
            place_before, place_behind = row_before * n_pieces + column, row_behind * n_pieces + column
            new = np.empty((3, len(column)), np.int64)
            new[0] = flat_ids.take(place_before)
            new[1] = flat_ids[place] = self._merged_ids.take(best >> _POSITION_BITS)
            new[2] = flat_ids.take(place_behind)
            flat_ids[gone] = _GONE
            flat_pairs[gone] = _NO_PAIR
            behind[place], before[place_behind] = row_behind, row
            ranks = self._ranks.of(new[:-1], new[1:]) << _POSITION_BITS
            flat_pairs[place_before] = ranks[0] | row_before
            flat_pairs[place] = ranks[1] | row
