"""BatchMerger: the same ids as BytePairMerger and as a direct implementation of the rule."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_encoder import GPT2Tokenizer
from gpt_encoder.arrays.batch_merger import BatchMerger
from gpt_encoder.vocab_files import byte_token_ids
from gpt_test.gpt_encoder.test_byte_pair import merge_plainly, merge_tables


def merge_many(merger: BatchMerger, pieces: list[bytes]) -> list[list[int]]:
    data = np.zeros((len(pieces), 31), np.uint8)
    for row, piece in zip(data, pieces, strict=True):
        row[: len(piece)] = list(piece)
    ids, counts = merger.merge(data, np.array(list(map(len, pieces)), np.int64))
    return [row.tolist() for row in np.split(ids, np.cumsum(counts)[:-1])]


@given(merge_tables(), st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=31), min_size=1, max_size=6))
@settings(max_examples=400)
def test_arbitrary_merges(table, rows: list[list[int]]) -> None:
    merger = BatchMerger.of(*table, byte_ids=[0, 1, 2, 3, *range(1000, 1252)])
    if merger is not None:
        assert merge_many(merger, list(map(bytes, rows))) == [merge_plainly(row, *table) for row in rows]


def test_an_order_that_no_training_produces_is_not_supported() -> None:
    """A pair with the new id ranks before the rank that made it: merging one pair at a time gives 5 for 0 1 0 1, not 4 4."""
    ranks, merged_ids = {(0, 1): 1, (4, 0): 0}, [5, 4]
    assert BatchMerger.of(ranks, merged_ids, byte_ids=[0, 1, *range(1000, 1254)]) is None
    assert BatchMerger.of({(0, 1): 0, (4, 0): 1}, [4, 5], byte_ids=[0, 1, *range(1000, 1254)]) is not None


def test_such_an_order_is_recognized_by_the_right_id_too() -> None:
    """The rule gives 5 4 for 2 0 1 0 1; merging one pair at a time gives 6 1."""
    ranks, merged_ids = {(2, 4): 0, (5, 0): 1, (0, 1): 2}, [5, 6, 4]
    assert merge_plainly([2, 0, 1, 0, 1], ranks, merged_ids) == [5, 4]
    assert BatchMerger.of(ranks, merged_ids, byte_ids=[0, 1, 2, *range(1000, 1253)]) is None


@pytest.mark.parametrize("wrong", [1 << 20, 1 << 33, -1, 0.5])
def test_ids_that_do_not_fit_into_the_tables_are_not_supported(wrong: float) -> None:
    for ranks, merged_ids, last in (({(0, 1): 0}, [wrong], 2), ({(0, wrong): 0}, [5], 2), ({(0, 1): 0}, [5], wrong)):
        assert BatchMerger.of(ranks, merged_ids, byte_ids=[0, 1, *range(1000, 1253), last]) is None


def test_the_largest_supported_id_and_two_bytes_with_the_same_id() -> None:
    far = 1 << 20
    assert BatchMerger.of({(0, 1): 0}, [far - 1], byte_ids=[0, 1, *range(1000, 1254)]).n_ids == far
    assert BatchMerger.of({(0, 1): 0}, [5], byte_ids=[0, 1, 1, *range(1000, 1253)]) is None


@given(
    st.lists(st.binary(min_size=1, max_size=31) | st.text("aelnorst ", min_size=1, max_size=31).map(str.encode), min_size=1)
)
def test_openais_merges(openai_tokenizer: GPT2Tokenizer, pieces: list[bytes]) -> None:
    byte_ids, plain = byte_token_ids(openai_tokenizer.vocabulary.token_ids), openai_tokenizer.merger
    merger = batch_merger(openai_tokenizer)
    assert merge_many(merger, pieces) == [plain.merge_short([byte_ids[byte] for byte in piece]) for piece in pieces]


@cache
def batch_merger(tokenizer: GPT2Tokenizer) -> BatchMerger:
    plain = tokenizer.merger
    merger = BatchMerger.of(plain.ranks, plain.merged_ids, byte_token_ids(tokenizer.vocabulary.token_ids))
    assert merger is not None
    return merger
