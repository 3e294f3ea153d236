"""PairRanks: the same ranks as with a dict."""

from __future__ import annotations

import secrets

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpt_encoder.arrays.pair_ranks import ID_BITS, UNRANKED, PairRanks

TOP = 1 << ID_BITS
IDS = st.one_of(st.integers(0, 5), st.integers(0, TOP - 1), st.just(TOP - 1))
TABLES = st.dictionaries(st.tuples(IDS, IDS), st.one_of(st.integers(0, 9), st.just(UNRANKED - 1)), max_size=60)
# TOP itself is the id that is in no pair.
ASKED = st.lists(st.tuples(st.one_of(IDS, st.just(TOP)), st.one_of(IDS, st.just(TOP))), max_size=60)


def ranks_of(table: dict[tuple[int, int], int]) -> PairRanks:
    left, right = np.array(list(table), np.int64).reshape(-1, 2).T
    return PairRanks(left, right, np.array(list(table.values()), np.int64))


@given(TABLES, ASKED)
def test_ranks_are_those_of_a_dict(table: dict[tuple[int, int], int], asked: list[tuple[int, int]]) -> None:
    asked = [*asked, *table]
    left, right = np.array(asked, np.int64).reshape(-1, 2).T
    assert ranks_of(table).of(left, right).tolist() == [table.get(pair, UNRANKED) for pair in asked]


def test_pairs_may_have_any_shape() -> None:
    ranks = ranks_of({(1, 2): 7, (2, 1): 8})
    ids = np.array([[1, 2], [2, 1], [1, 1]])
    assert ranks.of(ids[:-1], ids[1:]).tolist() == [[7, 8], [8, UNRANKED]]


def test_new_factors_are_drawn_if_pairs_find_no_slot() -> None:
    """With factors of 1 all small keys have the first slot."""
    drawn: list[int] = []

    def randbits(bits: int) -> int:
        drawn.append(bits)
        return secrets.randbits(bits) if len(drawn) > 2 else 0

    left, right = np.divmod(np.random.default_rng(0).permutation(1000), 40)
    ranks = PairRanks(left, right, np.arange(1000), randbits)
    assert len(drawn) > 2
    assert ranks.of(left, right).tolist() == list(range(1000))
    assert (ranks.of(left + 25, right) == UNRANKED).all()
