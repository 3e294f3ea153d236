"""HashTable: assign consecutive numbers to keys, many keys at once. It knows nothing of the meaning of a key."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpt_encoder.arrays import Flags, Numbers, Words

# Odd numbers, one per word of the key; the upper bits of the sum of products are the slot. They are random in each process:
# otherwise one could write a text whose pieces all have the same slot, which would take quadratic time.
_FACTORS = np.array([secrets.randbits(64) | 1 for _ in range(4)], np.uint64)

# Keys that are added to an empty table first. After that most other keys are in the table and are found in one step.
_FIRST_FEW = 1 << 12


class HashTable:
    """A table of at most `max_keys` keys of `n_words` 64-bit words, numbered from 1 as they are added.

    It uses open addressing with linear probing. The key with all bits set is not allowed: it marks an empty slot.
    """

    def __init__(self, n_words: int, max_keys: int) -> None:
        self.n_keys = 0
        # np.empty and one array per word, because writing zeros or allocating huge pages takes longer than encoding a text.
        self.keys = [np.empty(max_keys + 1, np.uint64) for _ in range(n_words)]
        for column in self.keys:
            column[0] = np.iinfo(np.uint64).max
        slot_bits = (2 * max_keys - 1).bit_length()  # at most half of the slots are used
        self._shift = np.uint64(64 - slot_bits)
        self._number_in_slot = np.zeros(1 << slot_bits, np.int32)

    def clear(self) -> None:
        """Remove all keys."""
        self.n_keys = 0
        self._number_in_slot[:] = 0

    def find_or_add(self, key: Sequence[Words]) -> Numbers:
        """The numbers (N,) of keys. New keys are added; the table must have room for them.

        `key` contains `n_words` arrays (N,), one for each word of the keys.
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
        """Assign each of the empty `slots` to one of the keys that have it as their slot."""
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
        """For each number, whether the key with this number equals `key`."""
        equal: Flags = self.keys[0].take(numbers) == key[0]
        for column, word in zip(self.keys[1:], key[1:], strict=True):
            equal &= column.take(numbers) == word
        return equal
