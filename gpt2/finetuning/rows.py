"""Batches of examples of similar length. Depends on the lengths of the examples, not on their content.

The examples of a step are a pure function of (seed, step), so a run can be resumed from any step. Each epoch contains every
example once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpt2.training.batches import shuffled

_BATCHES_IN_BLOCK = 16  # consecutive batches, at most an epoch, whose examples are sorted by length together


class LengthSortedRows:
    """`rows(step)` returns the indices of that step's examples, int64 (batch_size,), sorted by length.

    The examples of `block_size` consecutive steps are drawn together, sorted by length and divided into batches.
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
        # Sorted within each epoch, so that only a batch with rows of two epochs can contain an example twice.
        return rows[np.lexsort((self._lengths[rows], epochs))].reshape(self.block_size, self._batch_size)

    @property
    def mean_width(self) -> float:
        """The mean number of tokens per row, padding included, over the first block."""
        return float(np.mean(self._lengths[self._block(0)].max(axis=1)))


def in_order_of_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the indices of all examples, sorted by length, in batches of at most `batch_size`, for evaluation."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def pad(rows: Sequence[Sequence[int]], filler: int) -> NDArray[np.int64]:
    """Return `rows` as an int64 array (rows, length of the longest), padded on the right with `filler`."""
    width = max(map(len, rows))
    return np.array([[*row, *[filler] * (width - len(row))] for row in rows], np.int64)
