"""HashTable: number keys, many at once. It knows nothing of what a key stands for."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpt_encoder.arrays import Flags, Numbers, Words

# Odd numbers, one a word of the key: the upper bits of the sum of products choose the slot. They are drawn anew in each
# process, so that no one can write a text whose pieces all want the same slots, which would take quadratic time.
_FACTORS = np.array([secrets.randbits(64) | 1 for _ in range(4)], np.uint64)

# An empty table takes so many keys first: most of those that follow are there then, and are found in one step.
_FIRST_FEW = 1 << 12


class HashTable:
    """Keys of `n_words` 64-bit words, numbered from 1 in the order of their coming, `max_keys` of them at most.

    Open addressing with linear probing. The key of which all bits are set must not come: it is that of an empty slot.
    """

    def __init__(self, n_words: int, max_keys: int) -> None:
        self.n_keys = 0
        # Not zeros, and each word on its own: to write megabytes, or to get them in huge pages, takes longer than a text.
        self.keys = [np.empty(max_keys + 1, np.uint64) for _ in range(n_words)]
        for column in self.keys:
            column[0] = np.iinfo(np.uint64).max
        slot_bits = (2 * max_keys - 1).bit_length()  # at most half of the slots are taken
        self._shift = np.uint64(64 - slot_bits)
        self._number_in_slot = np.zeros(1 << slot_bits, np.int32)

    def clear(self) -> None:
        """Forget all keys."""
        self.n_keys = 0
        self._number_in_slot[:] = 0

    def find_or_add(self, key: Sequence[Words]) -> Numbers:
        """The numbers of keys; those that are not there are added, so there must be room for all of them.

        `key`: for each of the `n_words` an array (N,).
        """
        if not self.n_keys and len(key[0]) > 2 * _FIRST_FEW:
            self.find_or_add([word[:_FIRST_FEW] for word in key])
        slots = self._first_slots(key)
        numbers = self._number_in_slot.take(slots).astype(np.int64)
        waiting = np.flatnonzero(~self._are(numbers, key))
        while len(waiting):
            slot, waiting_key = slots[waiting], [word[waiting] for word in key]
            empty = self._number_in_slot.take(slot) == 0
            if empty.any():
                self._settle(slot[empty], [word[empty] for word in waiting_key])
            found = self._number_in_slot.take(slot)
            here = self._are(found, waiting_key)
            numbers[waiting[here]] = found[here]
            waiting = waiting[~here]
            slots[waiting] = (slots[waiting] + 1) % len(self._number_in_slot)
        return numbers

    def _settle(self, slots: Numbers, key: Sequence[Words]) -> None:
        """Give each of the empty `slots` one of the keys that want it."""
        claims = np.arange(1, len(slots) + 1, dtype=np.int32)
        self._number_in_slot[slots] = claims
        settled = self._number_in_slot.take(slots) == claims
        numbers = self.n_keys + 1 + np.arange(np.count_nonzero(settled))
        self.n_keys += len(numbers)
        self._number_in_slot[slots[settled]] = numbers
        for column, word in zip(self.keys, key, strict=True):
            column[numbers] = word[settled]

    def _first_slots(self, key: Sequence[Words]) -> Numbers:
        mixed = key[0] * _FACTORS[0]
        for word, factor in zip(key[1:], _FACTORS[1:], strict=False):
            mixed += word * factor
        mixed >>= self._shift
        slots: Numbers = mixed.view(np.int64)
        return slots

    def _are(self, numbers: npt.NDArray[np.signedinteger], key: Sequence[Words]) -> Flags:
        """Whether the keys with these numbers are `key`."""
        equal: Flags = self.keys[0].take(numbers) == key[0]
        for column, word in zip(self.keys[1:], key[1:], strict=True):
            equal &= column.take(numbers) == word
        return equal
