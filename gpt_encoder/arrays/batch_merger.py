"""BatchMerger: merge many pieces at once. It knows ids and ranks, and gives what BytePairMerger gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from gpt_encoder.arrays import Bytes, Ids, Numbers, from_list
from gpt_encoder.byte_pair import Pair

# So many pieces are merged together, of lengths as like as can be, for a short one among long ones is mostly padding.
_TOGETHER = 2048

# A rank and the position of its pair in one number: the least of them is the leftmost of the lowest rank.
_POSITION_BITS = 5
# Ids are places in tables.
_MAX_IDS = 1 << 20
_UNRANKED = 1 << 30
_MAX_RANKS = (_UNRANKED >> _POSITION_BITS) - 1


class BatchMerger:
    """The merges of one vocabulary, for pieces of at most 31 bytes. All ids are below `n_ids`."""

    def __init__(self, left: Numbers, right: Numbers, ranks: Numbers, merged_ids: Numbers, byte_ids: Numbers) -> None:
        """Pairs of ids `left` and `right` with their `ranks`, all (N,); the ids that ranks make; those of the 256 bytes, of
        which no two are alike.
        """
        self.n_ids = 1 + max(int(ids.max(initial=0)) for ids in (left, right, merged_ids, byte_ids))
        self._merged_ids, self._byte_ids = merged_ids.astype(np.int32), byte_ids.astype(np.int32)
        order = np.argsort(_key(left, right))
        self._keys = np.append(_key(left, right)[order], np.iinfo(np.int64).max)
        self._ranks = np.append(ranks[order], _MAX_RANKS).astype(np.int32)
        byte_of_id = np.full(self.n_ids, -1, np.int32)
        byte_of_id[byte_ids] = np.arange(256)
        of_bytes = (byte_of_id[left] >= 0) & (byte_of_id[right] >= 0)
        self._rank_of_bytes = np.full((256, 256), _MAX_RANKS, np.int32)
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
        if largest >= _MAX_IDS or len(merged) >= _MAX_RANKS or len(set(byte_ids)) < len(byte_ids):
            return None
        made_at = np.full(largest + 1, -1, np.int32)
        made_at[merged] = np.arange(len(merged))
        if (rank_of_pair <= np.maximum(made_at[left], made_at[right])).any():
            return None
        return cls(left, right, rank_of_pair, merged, of_bytes)

    def merge(self, data: Bytes, lengths: Numbers) -> tuple[Ids, Numbers]:
        """The ids of pieces, one after the other, and how many of each. `data`: (N, 31 or less) bytes; `lengths`: (N,)."""
        merged = np.empty(data.shape, np.int32)
        counts = lengths.copy()
        by_length = np.argsort(lengths)
        for start in range(0, len(lengths), _TOGETHER):
            rows = by_length[start : start + _TOGETHER]
            self._merge(np.ascontiguousarray(data[rows, : lengths[rows[-1]]].T), rows, merged, counts)
        return merged[np.arange(data.shape[1]) < counts[:, None]], counts

    def _merge(self, data: Bytes, rows: Numbers, merged: Ids, counts: Numbers) -> None:
        """Merge `data` (L, N), a column a piece; write their ids into `rows` of `merged` and lower their `counts`."""
        length = len(data)
        outside = np.arange(length)[:, None] >= counts[rows]
        ids = np.full((length + 2, len(rows)), self.n_ids, np.int32)  # nothing in front and nothing behind
        ids[1:-1] = self._byte_ids.take(data)
        ids[1:-1][outside] = self.n_ids
        pairs = np.full((length + 1, len(rows)), _UNRANKED, np.int32)
        ranks = self._rank_of_bytes.take(data[:-1].astype(np.uint16) << 8 | data[1:])
        ranks[outside[1:]] = _MAX_RANKS
        pairs[1:-1] = (ranks << _POSITION_BITS) + np.arange(1, length, dtype=np.int32)[:, None]
        while True:
            best = pairs.min(axis=0)
            going_on = best < _MAX_RANKS << _POSITION_BITS
            if not going_on.all():
                ended = ~going_on
                merged[rows[ended], : len(ids) - 2] = ids[1:-1, ended].T
                if not going_on.any():
                    return
                rows, best, ids, pairs = rows[going_on], best[going_on], ids[:, going_on], pairs[:, going_on]
            counts[rows] -= 1
            at = best & (1 << _POSITION_BITS) - 1
            ids, pairs = self._merge_at(at, self._merged_ids.take(best >> _POSITION_BITS), ids, pairs)

    def _merge_at(self, at: Ids, new: Ids, ids: Ids, pairs: Ids) -> tuple[Ids, Ids]:
        """Put the id `new` in place of those at `at` and `at + 1`, in each column."""
        columns = np.arange(len(at))
        behind = np.arange(len(ids) - 1, dtype=np.int32)[:, None] > at
        ids = np.where(behind, ids[1:], ids[:-1])
        ids[at, columns] = new
        pairs = np.where(behind[:-1], pairs[1:] - 1, pairs[:-1])
        left, right = ids[at - 1, columns], ids[at + 1, columns]
        in_front, behind = self._rank(np.stack([left, new]), np.stack([new, right]))
        pairs[at - 1, columns] = (in_front << _POSITION_BITS) + (at - 1)
        pairs[at, columns] = (behind << _POSITION_BITS) + at
        return ids, pairs

    def _rank(self, left: Ids, right: Ids) -> Ids:
        key = _key(left, right)
        at = np.searchsorted(self._keys, key)
        return np.where(self._keys.take(at) == key, self._ranks.take(at), np.int32(_MAX_RANKS))


def _key(left: npt.NDArray[np.signedinteger], right: npt.NDArray[np.signedinteger]) -> Numbers:
    return left.astype(np.int64) << 32 | right
