"""PairRanks: the ranks of pairs of ids, many at once. It knows nothing of bytes, or of what a merge does."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gpt_encoder.arrays import Numbers

# Ids are below 2 ** ID_BITS, or that number for one that is in no pair; ranks are below UNRANKED.
ID_BITS = RANK_BITS = 20
UNRANKED = (1 << RANK_BITS) - 1
_KEY_BITS = ID_BITS + 1

_EMPTY = -1
# So many slots for each pair, at least: with two places to choose from they would do with a little more than 2.
_SLOTS_PER_PAIR = 4
# With so many free slots all pairs find one in some ten rounds; where they do not, other factors are drawn.
_MAX_ROUNDS = 100


class PairRanks:
    """Pairs of ids and their ranks, in a table that never grows.

    Cuckoo hashing (Pagh and Rodler 2004): a pair is in one of two slots or nowhere, so that every pair is looked up in the
    same few steps, which take less than half the time of a search in a sorted array.
    """

    def __init__(
        self, left: Numbers, right: Numbers, ranks: Numbers, randbits: Callable[[int], int] = secrets.randbits
    ) -> None:
        """Pairs `left` and `right`, no two alike, with their `ranks`, all (N,). `randbits` draws the hash functions."""
        self._randbits = randbits
        pairs = _key(left, right) << RANK_BITS | ranks
        slot_bits = max(1, (_SLOTS_PER_PAIR * len(pairs) - 1).bit_length())
        self._shift = np.uint64(64 - slot_bits)
        self._slots = np.empty(1 << slot_bits, np.int64)
        while not self._settle(pairs):
            pass

    def _settle(self, pairs: Numbers) -> bool:
        """Give each pair a slot; False if some found none."""
        self._factors = [np.uint64(self._randbits(64) | 1) for _ in range(2)]
        self._slots[:] = _EMPTY
        wanted = self._first_slots(pairs >> RANK_BITS)
        for _ in range(_MAX_ROUNDS):
            driven_out = self._slots.take(wanted)
            self._slots[wanted] = pairs
            settled = self._slots.take(wanted) == pairs
            moved = settled & (driven_out != _EMPTY)
            pairs = np.concatenate([pairs[~settled], driven_out[moved]])
            if not len(pairs):
                return True
            wanted = np.concatenate([wanted[~settled], wanted[moved]]) ^ self._between_slots(pairs >> RANK_BITS)
        return False

    def of(self, left: Numbers, right: Numbers) -> Numbers:
        """The rank of each pair, of any shape; UNRANKED for one that has none."""
        key = _key(left, right)
        slots = self._first_slots(key)
        found, other = self._slots.take(slots), self._slots.take(slots ^ self._between_slots(key))
        found = np.where(found >> RANK_BITS == key, found, other)
        return np.where(found >> RANK_BITS == key, found & UNRANKED, UNRANKED)

    def _first_slots(self, key: Numbers) -> Numbers:
        return self._mixed(key, self._factors[0])

    def _between_slots(self, key: Numbers) -> Numbers:
        """What makes one of the two slots of a key of the other, by exclusive or."""
        return self._mixed(key, self._factors[1])

    def _mixed(self, key: Numbers, factor: np.uint64) -> Numbers:
        return (key.view(np.uint64) * factor >> self._shift).view(np.int64)


def _key(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> Numbers:
    return left << _KEY_BITS | right
