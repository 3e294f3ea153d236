"""Batches of examples of many lengths: those of a batch are about as long. It knows lengths and numbers, not texts.

Which examples a step has is a pure function of (seed, step, rank), so a run can go on anywhere. In each epoch every example
comes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpt2.training.batches import shuffled

_BATCHES_IN_BLOCK = 16  # examples of so many batches, or of an epoch if it has fewer, are sorted by length and shared out


class LengthSortedRows:
    """`rows(step)`: the numbers of that step's examples, `batch_size` of them, sorted by length.

    The batches of `block_size` consecutive steps are drawn together.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = np.array(lengths), batch_size, seed
        self.block_size = max(1, min(_BATCHES_IN_BLOCK, len(lengths) // batch_size))
        self._block = lru_cache(maxsize=2)(self._make_block)

    def __call__(self, step: int) -> NDArray[np.int64]:
        block, place = divmod(step, self.block_size)
        rows: NDArray[np.int64] = self._block(block)[shuffled(place, self.block_size, self._seed, 6, block)]
        return rows

    def _make_block(self, block: int) -> NDArray[np.int64]:
        size, n = self.block_size * self._batch_size, len(self._lengths)
        places = range(block * size, (block + 1) * size)
        epochs = np.array([place // n for place in places])
        rows = np.array([shuffled(place % n, n, self._seed, 5, place // n) for place in places])
        # Epoch by epoch, so that an example is not in a batch twice, but perhaps where epochs meet.
        return rows[np.lexsort((self._lengths[rows], epochs))].reshape(self.block_size, self._batch_size)

    @property
    def mean_width(self) -> float:
        """Tokens of a row, padding included, on average over the first block."""
        return float(np.mean(self._lengths[self._block(0)].max(axis=1)))


def in_order_of_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All examples once, in batches of about the same length: to measure on."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def pad(rows: Sequence[Sequence[int]], filler: int) -> NDArray[np.int64]:
    """`rows` as an int64 array (rows, tokens), filled up on the right."""
    width = max(map(len, rows))
    return np.array([[*row, *[filler] * (width - len(row))] for row in rows], np.int64)
