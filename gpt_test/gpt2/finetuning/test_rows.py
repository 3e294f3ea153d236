"""Batches of similar length: each epoch contains every example once, and the seed decides the batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.finetuning.rows import LengthSortedRows, in_order_of_length, pad

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(lengths, st.integers(1, 7), st.integers(0, 9))
def test_each_epoch_contains_every_example_once(lengths: list[int], batch_size: int, seed: int) -> None:
    rows = LengthSortedRows(lengths, batch_size, seed)
    n_steps = len(lengths)  # these are batch_size epochs, for any block size
    blocks = n_steps - n_steps % rows.block_size
    seen = Counter(int(row) for step in range(blocks) for row in rows(step))
    n_epochs, left_over = divmod(blocks * batch_size, len(lengths))
    assert set(seen[row] for row in range(len(lengths))) <= ({n_epochs, n_epochs + 1} if left_over else {n_epochs})
    if len(lengths) % batch_size == 0:
        assert len(set(rows(0).tolist())) == batch_size, "a batch contains an example twice"
    again = LengthSortedRows(lengths, batch_size, seed)
    assert all(np.array_equal(rows(step), again(step)) for step in (17, 3, 0))


def test_the_rows_of_a_batch_have_similar_lengths() -> None:
    lengths = list(np.random.default_rng(0).integers(1, 1000, 640))
    rows = LengthSortedRows(lengths, 8, seed=1)
    spread = [max(lengths[row] for row in rows(step)) - min(lengths[row] for row in rows(step)) for step in range(80)]
    assert np.mean(spread) < 100  # unsorted rows have about 780
    assert np.mean(lengths) < rows.mean_width < 1.15 * np.mean(lengths)
    assert sorted(np.concatenate([rows(n) for n in range(80)])) == sorted(np.concatenate([rows(n) for n in range(80, 160)]))
    assert not any(np.array_equal(rows(n), rows(n + 80)) for n in range(80)), "two epochs have the same order"
    firsts = [lengths[rows(step)[0]] for step in range(16)]
    assert firsts != sorted(firsts), "the batches of a block are in order of length"


@pytest.mark.parametrize("lengths", [[7] * 103, range(1, 104)])
def test_only_a_batch_of_two_epochs_contains_an_example_twice(lengths: Sequence[int]) -> None:
    rows = LengthSortedRows(lengths, 8, seed=0)
    twice = [step for step in range(103) if len(set(rows(step).tolist())) < 8]
    assert len(twice) <= 8  # eight epochs


@given(lengths, st.integers(1, 7))
def test_evaluation_contains_every_example_once(lengths: list[int], batch_size: int) -> None:
    batches = in_order_of_length(lengths, batch_size)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    flat = [lengths[row] for batch in batches for row in batch]
    assert flat == sorted(flat) and max(map(len, batches)) <= batch_size


def test_padding_is_on_the_right() -> None:
    assert pad([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]
