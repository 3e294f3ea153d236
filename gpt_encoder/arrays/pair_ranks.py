"""PairRanks: look up the ranks of many pairs of ids at once. It knows nothing of bytes or of what a merge does."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gpt_encoder.arrays import Numbers

# Ids are below 2 ** ID_BITS. That number itself is an id that is in no pair. Ranks are below UNRANKED.
ID_BITS = RANK_BITS = 20
UNRANKED = (1 << RANK_BITS) - 1
_KEY_BITS = ID_BITS + 1

_EMPTY = -1
# Minimum number of slots per pair. Cuckoo hashing with two slots to choose from needs slightly more than 2.
_SLOTS_PER_PAIR = 4
# All pairs find a slot in about ten rounds. If they do not within this many, other factors are drawn.
_MAX_ROUNDS = 100


class PairRanks:
    """A hash table of fixed size with the ranks of pairs of ids.

    It uses cuckoo hashing (Pagh and Rodler 2004): a pair is in one of two slots or not in the table. So each look-up has the
    same few steps, which take less than half the time of a search in a sorted array.
    """

    def __init__(
        self, left: Numbers, right: Numbers, ranks: Numbers, randbits: Callable[[int], int] = secrets.randbits
    ) -> None:
        """`left`, `right` and `ranks` (N,) are distinct pairs and their ranks. `randbits` draws the hash functions."""
        self._randbits = randbits
        pairs = _key(left, right) << RANK_BITS | ranks
        slot_bits = max(1, (_SLOTS_PER_PAIR * len(pairs) - 1).bit_length())
        self._shift = np.uint64(64 - slot_bits)
        self._slots = np.empty(1 << slot_bits, np.int64)
        while not self._settle(pairs):
            pass

    def _settle(self, pairs: Numbers) -> bool:
        """Assign a slot to each pair with new factors. False if a pair found none."""
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
        """The rank of each pair, in the shape of `left` and `right`; UNRANKED for a pair that is not in the table."""
        key = _key(left, right)
        slots = self._first_slots(key)
        found, other = self._slots.take(slots), self._slots.take(slots ^ self._between_slots(key))
        found = np.where(found >> RANK_BITS == key, found, other)
        return np.where(found >> RANK_BITS == key, found & UNRANKED, UNRANKED)

    def _first_slots(self, key: Numbers) -> Numbers:
        return self._mixed(key, self._factors[0])

    def _between_slots(self, key: Numbers) -> Numbers:
        """The exclusive or of the two slots of each key, which converts one slot to the other."""
        return self._mixed(key, self._factors[1])

    def _mixed(self, key: Numbers, factor: np.uint64) -> Numbers:
        return (key.view(np.uint64) * factor >> self._shift).view(np.int64)


def _key(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> Numbers:
    return left << _KEY_BITS | right
