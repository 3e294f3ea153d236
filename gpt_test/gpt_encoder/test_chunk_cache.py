"""ChunkCache: the ids equal those of each piece encoded alone, for any text and block length, before and after caching."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt_encoder import GPT2Tokenizer, train_bpe
from gpt_encoder.chunk_cache import CHUNK_PATTERN, CacheLimits, ChunkCache, is_plain

# Characters that the cuts depend on: spaces of all kinds, separators that are spaces only for `re`, contractions, scripts.
TRICKY = " \n\n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2003\u2028\u3000'sdlvre.a1Ⅷé字\u0301\u200d\U0001f999\x00"
tricky_text = st.text(st.sampled_from(TRICKY), max_size=40)
spaces_and_letters = st.text(st.sampled_from("  \n\na."), max_size=60)


@pytest.fixture(scope="module")
def tricky_tokenizer() -> GPT2Tokenizer:
    """A tokenizer whose tokens join spaces, separators and letters as the pattern allows, so a wrong cut changes ids."""
    generator = random.Random(0)
    return train_bpe(["".join(generator.choices(TRICKY, k=20_000)), "".join(generator.choices(" \n.a\x1c", k=20_000))], 1500)


def by_pieces(tokenizer: GPT2Tokenizer, text: str) -> list[int]:
    return [token for piece in tokenizer.split(text) for token in tokenizer.merge_piece(piece)]


@given(tricky_text | spaces_and_letters | st.text(max_size=60), st.integers(0, 12))
@settings(max_examples=300)
@example("x \n y\n\n\nz  ", 1)
@example("a\x1c b.\x1c.", 1)
def test_blocks_and_chunks_never_change_the_ids(tricky_tokenizer: GPT2Tokenizer, text: str, block_length: int) -> None:
    tokenizer = tricky_tokenizer
    cache = ChunkCache(tokenizer.split, tokenizer.merge_piece, CacheLimits(block_length=block_length))
    expected = by_pieces(tokenizer, text)
    assert cache.encode(text) == expected  # with an empty cache
    assert cache.encode(text) == expected  # with a filled cache


@given(tricky_text | spaces_and_letters | st.text())
@example(".\x1c.")
def test_chunks_split_into_the_pieces_of_the_text(openai_tokenizer: GPT2Tokenizer, text: str) -> None:
    chunks = CHUNK_PATTERN.findall(text)
    assert [piece for chunk in chunks for piece in openai_tokenizer.split(chunk)] == openai_tokenizer.split(text)


@given(tricky_text | st.text())
def test_a_piece_split_again_stays_one_piece(openai_tokenizer: GPT2Tokenizer, text: str) -> None:
    """Therefore chunks and pieces can share one table."""
    for piece in openai_tokenizer.split(text):
        assert openai_tokenizer.split(piece) == [piece]


def test_prose_takes_the_fast_path_and_code_the_other(openai_tokenizer: GPT2Tokenizer) -> None:
    """All other tests would pass if a mistake disabled the fast path."""
    plain = " The cat sat.\n\nIt was late\nand dark"
    assert is_plain(plain) and is_plain(plain + "é") and is_plain(" a\x1cb")
    for text in (
        plain + "\n",
        plain[1:],
        " a\tb",
        " a\x0bb",
        " a\rb",
        " a\xa0b",
        " é\tb",
        " a\u3000b",
        " a   b",
        " a\n\n\nb",
        " a \n b",
    ):
        assert not is_plain(text), repr(text)
    cache = ChunkCache(openai_tokenizer.split, openai_tokenizer.merge_piece)
    cache.encode(plain)
    assert cache.words and "The" in cache.words


def test_the_cache_is_bounded(openai_tokenizer: GPT2Tokenizer) -> None:
    cache = ChunkCache(openai_tokenizer.split, openai_tokenizer.merge_piece, CacheLimits(n_entries=10))
    text = " ".join(str(n) for n in range(200)) + " " + "x" * 1000
    assert cache.encode(text) == cache.encode(text) == by_pieces(openai_tokenizer, text)
    assert len(cache.chunks) <= 10 and len(cache.words) <= 10
    assert max(map(len, cache.chunks)) <= CacheLimits().entry_length
