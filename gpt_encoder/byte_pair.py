"""Byte-pair encoding: merge ids by rank until no ranked pair is left. It knows nothing of text, files or special tokens.

The rule (Sennrich et al. 2016, and `bpe` in OpenAI's `encoder.py`): find the adjacent pair with the lowest rank, replace
all its occurrences from left to right, repeat. `merge_short` implements the rule literally. `merge_long` returns the same
ids in O(n log n), so that no input is slow; tests compare the two.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import pairwise, repeat, zip_longest

Pair = tuple[int, int]

_UNRANKED = 1 << 62
_GONE = -1

# Break-even length of the two algorithms on English (measured). It does not change the ids.
_LONG = 96


class BytePairMerger:
    """The merges of one vocabulary.

    `ranks` maps a pair of ids to its rank; rank 0 is merged first. `merged_ids[rank]` is the id that replaces the pair. It
    differs from both ids, because every merge makes a longer token.
    """

    def __init__(self, ranks: Mapping[Pair, int], merged_ids: Sequence[int]) -> None:
        self.ranks = ranks
        self.merged_ids = merged_ids

    def merge(self, ids: list[int]) -> list[int]:
        """The ids after all merges. `ids` has one id per byte and is not changed."""
        return self.merge_short(ids) if len(ids) < _LONG else self.merge_long(ids)

    def merge_short(self, ids: list[int]) -> list[int]:
        """The ids after all merges, by the literal rule: O(n^2), but each pass over the ranks is one call in C."""
        ids = ids.copy()
        rank_of = self.ranks.get
        ranks = list(map(rank_of, pairwise(ids), repeat(_UNRANKED)))
        while ranks and (lowest := min(ranks)) != _UNRANKED:
            new_id = self.merged_ids[lowest]
            at = ranks.index(lowest)
            while True:
                ids[at : at + 2] = [new_id]
                del ranks[at]
                if at:
                    ranks[at - 1] = rank_of((ids[at - 1], new_id), _UNRANKED)
                if at < len(ranks):
                    ranks[at] = rank_of((new_id, ids[at + 1]), _UNRANKED)
                if lowest not in ranks:
                    break
                at = ranks.index(lowest, at)
        return ids

    def merge_long(self, ids: list[int]) -> list[int]:
        """The same ids in O(n log n), with one bucket of positions per rank and a linked list of ids."""
        ids = [*ids, _GONE]  # an end mark: a right neighbour of the last id that forms no pair
        before = list(range(-1, len(ids) - 1))
        after = list(range(1, len(ids) + 1))
        rank_of = self.ranks.get
        buckets: dict[int, list[int]] = {}  # rank -> positions of the left ids of its pairs; some are outdated
        for at, pair in enumerate(pairwise(ids)):
            rank = rank_of(pair)
            if rank is not None:
                buckets.setdefault(rank, []).append(at)
        waiting = list(buckets)
        heapq.heapify(waiting)

        def put(rank: int, at: int) -> None:
            bucket = buckets.get(rank)
            if bucket is None:
                buckets[rank] = [at]
                heapq.heappush(waiting, rank)
            else:
                bucket.append(at)

        while waiting:
            lowest = heapq.heappop(waiting)
            positions = buckets.pop(lowest)
            positions.sort()
            new_id = self.merged_ids[lowest]
            changed = []
            for at in positions:
                right = after[at]
                # Outdated: one of the two ids was merged since, so the pair at this position has another rank or none.
                if ids[at] == _GONE or rank_of((ids[at], ids[right])) != lowest:
                    continue
                ids[at] = new_id
                ids[right] = _GONE
                after[at] = after[right]
                before[after[at]] = at
                changed.append(at)
            for at, next_changed in zip_longest(changed, changed[1:]):
                left, right = before[at], after[at]
                if left >= 0 and (rank := rank_of((ids[left], new_id))) is not None:
                    put(rank, left)
                # If the right neighbour was merged too, the next iteration adds this pair, as that neighbour's left pair.
                if right != next_changed and (rank := rank_of((new_id, ids[right]))) is not None:
                    put(rank, at)
        return [token for token in ids if token != _GONE]
