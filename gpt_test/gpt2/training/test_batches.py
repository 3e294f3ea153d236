"""Batches are a function of (seed, step, rank), and each epoch contains every row once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.training.batches import Batches, EvaluationBatches, mix, shuffled
from gpt2.training.token_file import TokenFile
from gpt_config import DataError


def counting_file(n: int) -> TokenFile:
    return TokenFile(Path("counting.bin"), np.arange(n, dtype=np.uint32), n, n, bytes(24))


@given(st.integers(1, 300), st.integers(0, 2**64), st.integers(0, 5))
def test_shuffled_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(i, n, seed, epoch) for i in range(n)) == list(range(n))


def test_orders_of_epochs_and_seeds_look_unrelated() -> None:
    orders = [[shuffled(i, 997, seed, epoch) for i in range(997)] for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(orders):
        assert abs(np.corrcoef(one, range(997))[0, 1]) < 0.12
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


def test_mix_distinguishes_its_arguments() -> None:
    values = {mix(*key) for key in [(0,), (0, 0), (1,), (0, 1), (1, 0), (-1,), (2**64,), (0, 2**32)]}
    assert len(values) >= 7  # in 64 bits, 2**64 is 0
    assert all(0 <= value < 2**64 for value in values)


@given(st.integers(1, 9), st.integers(2, 400), st.integers(1, 5), st.integers(0, 9))
def test_an_epoch_has_every_row_once_and_targets_follow_inputs(context: int, extra: int, batch_size: int, seed: int) -> None:
    batches = Batches(counting_file(context + extra), context, batch_size, seed)
    n_rows = batches.rows_per_epoch
    rows = [row for step in range(-(-n_rows // batch_size)) for row in batches(step)[0].tolist()][:n_rows]
    starts = sorted(row[0] for row in rows)
    assert [b - a for a, b in pairwise(starts)] == [context] * (n_rows - 1)
    inputs, targets = batches(0)
    assert inputs.dtype == np.int64 and inputs.shape == targets.shape == (batch_size, context)
    assert (targets == inputs + 1).all()


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 50))
def test_processes_share_the_rows_of_one_process(world_size: int, step: int) -> None:
    for kind in (Batches, EvaluationBatches):
        batches = kind(counting_file(2000), 10, 12, 7)
        together = np.concatenate([batches(step % 5, rank, world_size)[0] for rank in range(world_size)])
        assert sorted(together[:, 0]) == sorted(batches(step % 5)[0][:, 0])


def test_cuts_differ_between_epochs_and_seeds() -> None:
    batches = Batches(counting_file(1000), 10, 1, 0)
    assert len({batches(epoch * batches.rows_per_epoch)[0][0, 0] % 10 for epoch in range(20)}) > 5
    assert len({Batches(counting_file(1000), 10, 1, seed)(0)[0][0, 0] % 10 for seed in range(20)}) > 5


def test_evaluation_rows_are_fixed_and_spread_without_overlap() -> None:
    batches = EvaluationBatches(counting_file(1001), 10, 4, 0, limit=5)
    starts = [int(start) for i in range(batches.count) for start in batches(i)[0][:, 0]]
    assert batches.count == 5 and starts == sorted(set(starts)) and starts == [50 * i for i in range(20)]
    short = EvaluationBatches(counting_file(25), 10, 4, 0)
    assert short.count == 1 and short(0)[0][:, 0].tolist() == [0, 10]
    assert short(0, 1, 3)[0].shape == (2, 10), "rows that cannot be divided evenly are computed by each process"


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(DataError, match="10 tokens, too few for one row of context=10"):
        Batches(counting_file(10), 10, 1, 0)
    assert Batches(counting_file(11), 10, 2, 0)(3)[0].tolist() == [list(range(10))] * 2


@pytest.mark.parametrize(("n_rows", "measured"), [(1, 1), (17, 17), (31, 31), (47, 47), (80, 64)])
def test_partial_batches_are_measured_with_their_weight(n_rows: int, measured: int) -> None:
    batches = EvaluationBatches(counting_file(n_rows * 8 + 1), 8, 16, 0, limit=4)
    sizes = [len(batches(i)[0]) for i in range(batches.count)]
    assert sum(sizes) == measured
    assert [batches.share(i) for i in range(batches.count)] == [size / measured for size in sizes]


def test_a_short_validation_text_is_one_shorter_row() -> None:
    batches = EvaluationBatches(counting_file(6), 10, 4, 0)
    assert batches.count == 1 and batches(0)[0].tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(DataError, match="1 tokens, too few"):
        EvaluationBatches(counting_file(1), 10, 4, 0)
