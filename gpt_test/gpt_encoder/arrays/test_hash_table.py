"""HashTable: the same numbers as with a dict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_encoder.arrays.hash_table import HashTable


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30), min_size=1, max_size=5))
def test_numbers_are_those_of_a_dict(batches: list[list[tuple[int, int]]]) -> None:
    """Each key keeps its number; the numbers are consecutive from 1."""
    table = HashTable(2, max_keys=36)
    known: dict[tuple[int, int], int] = {}
    for batch in batches:
        words = np.array(batch, np.uint64).reshape(-1, 2).T
        for key, number in zip(batch, table.find_or_add(list(words)).tolist(), strict=True):
            assert known.setdefault(key, number) == number
            assert [int(column[number]) for column in table.keys] == list(key)
        assert sorted(known.values()) == list(range(1, len(known) + 1))
        assert table.n_keys == len(known)
    table.clear()
    assert table.find_or_add([np.array([3], np.uint64)] * 2).tolist() == [1]


@pytest.mark.parametrize("spread", [1, 1 << 40, (1 << 61) - 1])
def test_a_full_table_of_evenly_spaced_keys(spread: int) -> None:
    """The table is filled to its capacity at once. Then the keys are looked up in another order."""
    keys = np.arange(1, 10_001, dtype=np.uint64) * np.uint64(spread)
    table = HashTable(1, max_keys=10_000)
    numbers = table.find_or_add([keys])
    assert sorted(numbers.tolist()) == list(range(1, 10_001))
    order = np.random.default_rng(0).permutation(10_000)
    assert table.find_or_add([keys[order]]).tolist() == numbers[order].tolist()
    assert table.n_keys == 10_000
