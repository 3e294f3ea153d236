"""BytePairMerger: both algorithms against a direct implementation of the rule, with OpenAI's and with arbitrary merges."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt_encoder import GPT2Tokenizer
from gpt_encoder.byte_pair import BytePairMerger
from gpt_encoder.vocab_files import byte_token_ids


def merge_plainly(ids: list[int], ranks: dict[tuple[int, int], int], merged_ids: list[int]) -> list[int]:
    """The ids by the literal rule: replace all occurrences of the pair of lowest rank from left to right, and repeat."""
    while True:
        ranked = [ranks[pair] for pair in pairwise(ids) if pair in ranks]
        if not ranked:
            return ids
        lowest, out, at = min(ranked), [], 0
        while at < len(ids):
            if ranks.get(tuple(ids[at : at + 2])) == lowest:
                out.append(merged_ids[lowest])
                at += 2
            else:
                out.append(ids[at])
                at += 1
        ids = out


@st.composite
def merge_tables(draw: st.DrawFn) -> tuple[dict[tuple[int, int], int], list[int]]:
    """Ranks and merged ids over the byte ids 0 to 3, in any order of rank, also tables that no training produces.

    Several pairs may make the same id, as in vocabularies in which two merges make one token.
    """
    n = draw(st.integers(0, 12))
    pairs = draw(st.lists(st.tuples(st.integers(0, 3 + n), st.integers(0, 3 + n)), min_size=n, max_size=n, unique=True))
    new_ids = draw(st.lists(st.integers(4, 4 + n), min_size=n, max_size=n))
    kept = [place for place in range(n) if new_ids[place] not in pairs[place]]  # a merged token is longer than both
    pairs, new_ids, n = [pairs[place] for place in kept], [new_ids[place] for place in kept], len(kept)
    ranks = draw(st.permutations(range(n)))
    merged_ids = [0] * n
    for rank, new_id in zip(ranks, new_ids, strict=True):
        merged_ids[rank] = new_id
    return dict(zip(pairs, ranks, strict=True)), merged_ids


@given(merge_tables(), st.lists(st.integers(0, 3), max_size=60))
@settings(max_examples=400)
@example(({(0, 0): 0, (1, 1): 1, (4, 4): 2}, [4, 4, 5]), [1, 1, 0, 0, 0, 0])  # positions are added in the wrong order
@example(({(3, 3): 0, (1, 0): 1, (4, 0): 2}, [3, 3, 4]), [1, 0, 0, 1, 0, 1, 0, 1, 0])  # one rank becomes the lowest twice
def test_both_algorithms_follow_the_rule(table, ids: list[int]) -> None:
    merger = BytePairMerger(*table)
    expected = merge_plainly(ids, *table)
    assert merger.merge_short(ids) == expected
    assert merger.merge_long(ids) == expected
    assert merger.merge(ids) == expected


@given(st.lists(st.sampled_from(b"aehinorst ^"), max_size=150))
def test_both_algorithms_agree_on_openai_merges(openai_tokenizer: GPT2Tokenizer, text: list[int]) -> None:
    merger = openai_tokenizer.merger
    ids = list(map(byte_token_ids(openai_tokenizer.vocabulary.token_ids).__getitem__, text))
    assert merger.merge_short(ids) == merger.merge_long(ids) == merge_plainly(ids, merger.ranks, merger.merged_ids)


def test_the_input_is_not_changed(openai_tokenizer: GPT2Tokenizer) -> None:
    ids = list(map(byte_token_ids(openai_tokenizer.vocabulary.token_ids).__getitem__, b"hello" * 50))
    before = ids.copy()
    openai_tokenizer.merger.merge_short(ids)
    openai_tokenizer.merger.merge_long(ids)
    assert ids == before


def test_every_token_is_made_by_its_own_merge(openai_tokenizer: GPT2Tokenizer) -> None:
    """The reason why this rule and tiktoken's give the same ids. tiktoken merges any neighbours whose bytes form a token.

    The test shows that the bytes of each token alone merge to that token. So when the rank of a token is the lowest, two
    neighbours that form the token are always its recorded pair. Both rules then do the same merges in the same order.
    """
    byte_ids, merger = byte_token_ids(openai_tokenizer.vocabulary.token_ids), openai_tokenizer.merger
    for token_id, token in openai_tokenizer.token_bytes.items():
        if token_id != openai_tokenizer.eot_token_id:
            assert merger.merge_short([byte_ids[byte] for byte in token]) == [token_id]


@pytest.mark.parametrize("text", ["a", "ab", "^", "the ", "\U0001f999", "zqxj"])
def test_time_is_not_quadratic_in_the_length(openai_tokenizer: GPT2Tokenizer, text: str) -> None:
    """Ten times the text takes about ten times as long. With a quadratic algorithm it would take a hundred times as long."""
    byte_ids, merge = byte_token_ids(openai_tokenizer.vocabulary.token_ids), openai_tokenizer.merger.merge

    def seconds(n_bytes: int) -> float:
        repeated = (text.encode() * n_bytes)[:n_bytes]
        ids = [byte_ids[byte] for byte in repeated]
        best = float("inf")
        for _ in range(3):
            began = time.thread_time()  # of this thread alone: other processes do not count
            merge(ids)
            best = min(best, time.thread_time() - began)
        return best

    assert seconds(100_000) < 40 * seconds(10_000)
