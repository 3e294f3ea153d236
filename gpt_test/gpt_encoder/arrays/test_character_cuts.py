"""CharacterCuts: no cut where a token may span two characters, and cuts nearly everywhere else."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_encoder import GPT2Tokenizer
from gpt_encoder.arrays.character_cuts import CharacterCuts
from gpt_encoder.vocab_files import tokens_beyond_ascii

CHARACTERS = "a1 'é½я\u05d0\u0e01\u3000のァー龍士人\uffff🦙𝒳"


def is_cut(cuts: CharacterCuts, front: str, back: str) -> bool:
    text = front + back
    first_bytes = np.array([character.encode()[0] for character in text], np.uint8)
    starts = cuts.starts(first_bytes, np.array([ord(character) for character in text if character > "\x7f"], np.uint32))
    assert not starts[0]
    return bool(starts[1])


def joins(token: bytes, front: str, back: str) -> bool:
    """Whether `token` may span the two characters: it contains adjacent bytes of both."""
    both, place = (front + back).encode(), len(front.encode())
    for start in range(place):
        for end in range(place + 1, len(both) + 1):
            at = token.find(both[start:end])
            while at >= 0:
                whole_front = start == 0 or at == 0
                whole_back = end == len(both) or at + end - start == len(token)
                if whole_front and whole_back:
                    return True
                at = token.find(both[start:end], at + 1)
    return False


pairs_of_bytes = st.tuples(st.sampled_from(CHARACTERS), st.sampled_from(CHARACTERS)).map(lambda pair: "".join(pair).encode())


@given(st.lists(st.tuples(pairs_of_bytes, st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4))
def test_no_cut_where_a_token_may_span_two_characters(some: list[tuple[bytes, int, int]]) -> None:
    """The tokens are the bytes of two characters, or a part of them."""
    tokens = [data[first : len(data) - last] for data, first, last in some if len(data) - last - first > 1]
    cuts = CharacterCuts(tokens)
    for front, back in product(CHARACTERS, repeat=2):
        if any(joins(token, front, back) for token in tokens):
            assert not is_cut(cuts, front, back), (tokens, front, back)


@pytest.mark.parametrize(("front", "back", "cut"), [
    ("a", "b", False), ("1", " ", False),  # ASCII text is not cut
    ("龍", "喚", False), (" ", "é", False), ("\u30bc", "\u30a6", False),  # tokens span these
    ("人", "一", True), ("\u0e01", "\u0e02", True), ("a", "人", True), ("人", " ", True),
    ("🦙", "人", False), ("人", "🦙", False),  # no cuts next to characters beyond the basic plane
])  # fmt: skip
def test_openais_tokens(openai_tokenizer: GPT2Tokenizer, front: str, back: str, cut: bool) -> None:
    assert is_cut(CharacterCuts(tokens_beyond_ascii(openai_tokenizer.vocabulary.token_ids)), front, back) == cut


def test_tokens_beyond_ascii_contain_all_merges_beyond_ascii(openai_tokenizer: GPT2Tokenizer) -> None:
    given_tokens = set(tokens_beyond_ascii(openai_tokenizer.vocabulary.token_ids))
    made = [openai_tokenizer.token_bytes[token_id] for token_id in openai_tokenizer.merger.merged_ids]
    assert given_tokens >= {token for token in made if not token.isascii()}
