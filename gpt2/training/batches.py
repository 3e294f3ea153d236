"""Training batches as a pure function of (seed, step, rank). Depends on token files, not on the model.

The text is cut into rows of `context` tokens. Each epoch contains every row once, in its own order, and cuts the text at
other places. No order is stored: a keyed permutation (a Feistel network: Luby and Rackoff 1988) maps the number of a row in
the epoch to its place in the text. So the batch of any step can be computed directly, on any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpt2.training.token_file import TokenFile
from gpt_config.errors import DataError

_ROUNDS = 4  # of the Feistel network
_MASK_64 = (1 << 64) - 1  # the low 64 bits


def mix(*numbers: int) -> int:
    """Return 64 bits that depend on all of `numbers` and look random (the finalizer of SplitMix64, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK_64)) + 0x9E3779B97F4A7C15 & _MASK_64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK_64
        state ^= state >> 31
    return state


def shuffled(index: int, n: int, *key: int) -> int:
    """Return the place of `index` (0 to n - 1) in the order that `key` selects: a permutation of 0 to n - 1."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:  # the network permutes the numbers below a power of four; results of n or more go through it again
        left, right = index >> half, index & (1 << half) - 1
        for turn in range(_ROUNDS):
            left, right = right, left ^ mix(*key, turn, right) & (1 << half) - 1
        index = left << half | right
        if index < n:
            return index


@dataclass(frozen=True)
class Batches:
    """Training batches: `batches(step)` returns inputs and targets, int64 arrays of shape (batch_size, context).

    With `rank` and `world_size` it returns that process's batch_size / world_size rows of the same batch. DataError if the
    file has fewer than `context` + 1 tokens.
    """

    tokens: TokenFile
    context: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        # The target of the last token of a row is the token after the row.
        if len(self.tokens) < self.context + 1:
            raise DataError(
                f"{self.tokens.path.name} has {len(self.tokens)} tokens, too few for one row of context={self.context} and "
                "the token after it: add text, or use a shorter context"
            )

    @property
    def rows_per_epoch(self) -> int:
        """Rows per epoch: one fewer than fit into the text, so that the cuts can move by up to a row; at least 1."""
        return max(1, (len(self.tokens) - self.context) // self.context)

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        share, left_over = divmod(self.batch_size, world_size)
        assert not left_over, "the trainer checks that batch_size is a multiple of world_size"
        first = step * self.batch_size + rank * share
        return self._rows([self._start_of(row) for row in range(first, first + share)])

    def _start_of(self, row: int) -> int:
        epoch, place = divmod(row, self.rows_per_epoch)
        slack = len(self.tokens) - 1 - self.rows_per_epoch * self.context
        offset = mix(self.seed, 1, epoch) % (slack + 1)
        return offset + self.context * shuffled(place, self.rows_per_epoch, self.seed, 2, epoch)

    def _rows(self, starts: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows = np.stack([self.tokens.tokens[start : start + self.context + 1] for start in starts]).astype(np.int64)
        return rows[:, :-1], rows[:, 1:]


@dataclass(frozen=True)
class EvaluationBatches(Batches):
    """The same rows in each evaluation: `batches(i)` for i below `count`, evenly spread over the text, without overlap.

    A text that is shorter than `context` is one shorter row. The last batch has fewer rows if the text has no more.
    DataError if the file has fewer than 2 tokens.
    """

    limit: int = 20

    def __post_init__(self) -> None:
        if len(self.tokens) < 2:
            raise DataError(f"{self.tokens.path.name} has {len(self.tokens)} tokens, too few to predict one: add text")
        if len(self.tokens) < self.context + 1:
            object.__setattr__(self, "context", len(self.tokens) - 1)

    @property
    def count(self) -> int:
        """Number of batches: `limit`, or fewer if the text is short; at least 1."""
        return min(self.limit, -(-self._rows_there // self.batch_size))

    def share(self, step: int) -> float:
        """The share of all measured rows that batch `step` has: its weight in the mean over the batches."""
        return len(self._rows_of(step)) / self._n_measured

    @property
    def _rows_there(self) -> int:
        return (len(self.tokens) - 1) // self.context

    @property
    def _n_measured(self) -> int:
        return min(self._rows_there, self.limit * self.batch_size)

    def _rows_of(self, step: int) -> range:
        return range(step * self.batch_size, min((step + 1) * self.batch_size, self._n_measured))

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows = self._rows_of(step)
        if len(rows) % world_size:  # not divisible: every process computes all rows, which gives the same mean
            rank, world_size = 0, 1
        return self._rows([row * self._rows_there // self._n_measured * self.context for row in rows[rank::world_size]])
