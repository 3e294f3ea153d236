"""BatchMerger: merge many pieces at once. It knows ids and ranks, and gives what BytePairMerger gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gpt_encoder.byte_pair import Pair

Ids: TypeAlias = npt.NDArray[np.int32]
Lengths: TypeAlias = npt.NDArray[np.int64]

# Pieces of like lengths are merged together, for a short one among long ones is mostly padding.
_LENGTHS = (7, 15, 31)

# A rank and the position of its pair in one number: the least of them is the leftmost of the lowest rank.
_POSITION_BITS = 5
_UNRANKED = 1 << 30
_MAX_RANKS = (_UNRANKED >> _POSITION_BITS) - 1


class BatchMerger:
    """The merges of one vocabulary, for pieces of at most 31 bytes.

    It merges one pair at a time where the rule merges all of one rank. Unless `is_exact` that is not the same; it is the
    same where no pair ranks before a merge that makes one of its ids, as in every vocabulary that was ever learned: then
    no new pair comes before the others of the rank that made it.
    """

    def __init__(self, ranks: Mapping[Pair, int], merged_ids: Sequence[int], byte_ids: Sequence[int]) -> None:
        """`ranks` and `merged_ids` as in BytePairMerger; `byte_ids`: the id of each of the 256 bytes."""
        left, right = np.fromiter(chain.from_iterable(ranks), np.int64, 2 * len(ranks)).reshape(-1, 2).T
        rank_of_pair = np.fromiter(ranks.values(), np.int64, len(ranks))
        self._merged_ids = np.array(merged_ids, np.int32)
        self._byte_ids = np.array(byte_ids, np.int32)
        self._no_id = 1 + max(chain(byte_ids, merged_ids, chain.from_iterable(ranks)))
        order = np.argsort(_key(left, right))
        self._keys = np.append(_key(left, right)[order], np.iinfo(np.int64).max)
        self._ranks = np.append(rank_of_pair[order], _MAX_RANKS).astype(np.int32)

        made_at = np.full(self._no_id, -1)
        made_at[self._merged_ids] = np.arange(len(merged_ids))
        in_order = (rank_of_pair > made_at[left]) & (rank_of_pair > made_at[right])
        self.is_exact = len(merged_ids) < _MAX_RANKS and bool(in_order.all())

        byte_of_id = np.full(self._no_id, -1)
        byte_of_id[self._byte_ids] = np.arange(256)
        of_bytes = (byte_of_id[left] >= 0) & (byte_of_id[right] >= 0)
        self._rank_of_bytes = np.full((256, 256), _MAX_RANKS, np.int32)
        self._rank_of_bytes[byte_of_id[left[of_bytes]], byte_of_id[right[of_bytes]]] = rank_of_pair[of_bytes]

    def merge(self, data: npt.NDArray[np.uint8], lengths: Lengths) -> tuple[Ids, Lengths]:
        """The ids of pieces, one after the other, and how many of each. `data`: (N, 31 or less) bytes; `lengths`: (N,)."""
        merged = np.empty(data.shape, np.int32)
        counts = lengths.copy()
        shorter = 0
        for longest in _LENGTHS:
            rows = np.flatnonzero((lengths > shorter) & (lengths <= longest))
            if len(rows):
                self._merge(np.ascontiguousarray(data[rows, :longest].T), rows, merged, counts)
            shorter = longest
        return merged[np.arange(data.shape[1]) < counts[:, None]], counts

    def _merge(self, data: npt.NDArray[np.uint8], rows: Lengths, merged: Ids, counts: Lengths) -> None:
        """Merge `data` (L, N), a column a piece; write their ids into `rows` of `merged` and lower their `counts`."""
        length = len(data)
        outside = np.arange(length)[:, None] >= counts[rows]
        ids = np.full((length + 2, len(rows)), self._no_id, np.int32)  # nothing in front and nothing behind
        ids[1:-1] = self._byte_ids.take(data)
        ids[1:-1][outside] = self._no_id
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


def _key(left: npt.NDArray[np.signedinteger], right: npt.NDArray[np.signedinteger]) -> npt.NDArray[np.int64]:
    return left.astype(np.int64) << 32 | right
