"""The cut into chunks never changes the ids: any text, any block length, cold or warm, against the pieces one by one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt_encoder import GPT2Tokenizer, chunk_cache, train_bpe
from gpt_encoder.character_cuts import Splitter
from gpt_encoder.chunk_cache import ChunkCache
from gpt_encoder.split_pattern import CHUNK_PATTERN, SPLIT_PATTERN

# What the cut depends on: all kinds of spaces, the separators that only `re` takes for spaces, contractions, scripts.
TRICKY = " \n\n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2003\u2028\u3000'sdlvre.a1Ⅷé字\u0301\u200d\U0001f999\x00"
tricky_text = st.text(st.sampled_from(TRICKY), max_size=40)
spaces_and_letters = st.text(st.sampled_from("  \n\na."), max_size=60)


def make_tricky_tokenizer() -> GPT2Tokenizer:
    """Its tokens join spaces, separators and letters wherever the pattern lets them, so a wrong cut changes ids."""
    generator = random.Random(0)
    return train_bpe(["".join(generator.choices(TRICKY, k=20_000)), "".join(generator.choices(" \n.a\x1c", k=20_000))], 1500)


def by_pieces(tokenizer: GPT2Tokenizer, text: str) -> list[int]:
    return [token for piece in SPLIT_PATTERN.findall(text) for token in tokenizer._merge_piece(piece)]


def whole_words(tokenizer: GPT2Tokenizer) -> dict[str, int]:
    """Texts that merge to one id, found by merging them."""
    texts = (token.decode("utf-8", "ignore") for token in tokenizer.token_bytes.values())
    return {text: ids[0] for text in texts if text and len(ids := by_pieces(tokenizer, text)) == 1}


def cache_of(tokenizer: GPT2Tokenizer, known: Callable[[], dict[str, int]] = dict) -> ChunkCache:
    splitter = Splitter(tokenizer._tokens_beyond_ascii)
    return ChunkCache(splitter.split, splitter.cut, tokenizer._merge_piece, known)


TOKENIZER = make_tricky_tokenizer()
KNOWN_WORDS = whole_words(TOKENIZER)
READY = Splitter(TOKENIZER._tokens_beyond_ascii)
READY.split("é" * 20_000)


@given(tricky_text | spaces_and_letters | st.text(max_size=60), st.integers(0, 12), st.booleans())
@settings(max_examples=400)
@example("x \n y\n\n\nz  ", 1, False)
@example(" a\n\n b", 20, True)
@example("a\x1c b.\x1c.", 1, True)
def test_blocks_and_chunks_never_change_the_ids(text: str, block_length: int, has_shortcuts: bool) -> None:
    splitter = READY if has_shortcuts else Splitter(TOKENIZER._tokens_beyond_ascii)
    cache = ChunkCache(splitter.split, splitter.cut, TOKENIZER._merge_piece, lambda: KNOWN_WORDS, block_length)
    if has_shortcuts:
        cache._learn_known_words()
    expected = by_pieces(TOKENIZER, text)
    assert cache.encode(text) == expected  # cold
    assert cache.encode(text) == expected  # warm


@given(tricky_text | spaces_and_letters | st.text())
@example(".\x1c.")
def test_to_split_chunks_is_to_split_the_text(openai_tokenizer: GPT2Tokenizer, text: str) -> None:
    chunks = CHUNK_PATTERN.findall(text)
    assert [piece for chunk in chunks for piece in SPLIT_PATTERN.findall(chunk)] == SPLIT_PATTERN.findall(text)


@given(tricky_text | st.text())
def test_a_piece_on_its_own_is_one_piece(openai_tokenizer: GPT2Tokenizer, text: str) -> None:
    """So chunks and pieces can share one table."""
    for piece in openai_tokenizer.split(text):
        assert openai_tokenizer.split(piece) == [piece]


def test_prose_takes_the_fast_path_and_code_the_other(openai_tokenizer: GPT2Tokenizer) -> None:
    """Without this, a mistake could turn the fast path off and every other test would still pass."""
    plain = " The cat sat.\n\nIt was late\nand dark"
    assert all(chunk_cache._words(text) for text in (plain, plain + "é", " a\x1cb", " a  b", " a \nb", " a\n b"))
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
        " a\n\n b",
        " a\n \nb",
        " a\n  b",
        " a \n b",
        " a \n\nb",
        " a  \nb",
    ):
        assert chunk_cache._words(text) is None, repr(text)
    cache = cache_of(openai_tokenizer)
    cache.encode(plain)
    assert cache._words and "The" in cache._words


def test_the_cache_is_bounded(openai_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_cache, "_CACHED_CHUNKS", 10)
    cache = cache_of(openai_tokenizer)
    text = " ".join(str(n) for n in range(200)) + " " + "x" * 1000
    assert cache.encode(text) == cache.encode(text) == by_pieces(openai_tokenizer, text)
    assert len(cache._pieces) <= 10 and len(cache._words) <= 10
    assert max(map(len, cache._pieces)) <= chunk_cache._CACHED_LENGTH


def test_an_emptied_cache_still_has_the_known_words(
    openai_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_cache, "_CACHED_CHUNKS", 10)
    monkeypatch.setattr(chunk_cache, "_WORTH_KNOWN_WORDS", 0)
    cache = cache_of(openai_tokenizer, known=lambda: {" the": 262, "the": 1169})
    assert cache.encode("the" + " the" + " q".join(str(n) for n in range(50))) and len(cache._pieces) <= 12
    assert "the" in cache._words and " the" in cache._pieces


def test_the_known_words_are_tokens_that_merge_to_themselves(openai_tokenizer: GPT2Tokenizer) -> None:
    """They are taken on trust for OpenAI's merges alone; with other merges there are none."""
    known = openai_tokenizer._known_words()
    assert len(known) > 45_000
    assert all(openai_tokenizer._merge_piece(text) == [token_id] for text, token_id in known.items())
    assert not train_bpe(["low lower lowest"], 260)._known_words()
