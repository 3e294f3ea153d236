"""ArrayEncoder against the merge of each piece that the pattern finds."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_encoder import GPT2Tokenizer, train_bpe
from gpt_encoder.arrays import encoder, piece_table
from gpt_encoder.arrays.encoder import ArrayEncoder
from gpt_test.conftest import TRAINING_TEXT

SYMBOLS = [*" \n\u3000'st1.éя人のー龍🦙", "  ", "\n\n", "'ll", "'re", "Hello", " world", "internationalization", "=" * 40]
texts = st.lists(st.sampled_from(SYMBOLS), min_size=1, max_size=40).map("".join)


def plain_ids(tokenizer: GPT2Tokenizer, text: str) -> list[int]:
    return [token for piece in tokenizer.split(text) for token in tokenizer._merge_piece(piece)]


@pytest.fixture(scope="module")
def learned() -> GPT2Tokenizer:
    """A small vocabulary that joins characters of several scripts."""
    return train_bpe([f"{TRAINING_TEXT} 人のー龍🦙 人の人の éя éяé 🦙🦙 のー  \n\n" * 3], vocab_size=400)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(encoder, "_MAX_PIECES", 64)
    monkeypatch.setattr(encoder, "_MAX_PIECES_AT_ONCE", 20)
    monkeypatch.setattr(piece_table, "_WORTH_BATCH", 3)
    yield


@given(texts, st.sampled_from([1, 2, 3, 7, 50, 1 << 19]))
def test_any_text_in_windows_of_any_length(openai_tokenizer: GPT2Tokenizer, learned, text: str, window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "_WINDOW", window)
        for tokenizer in (openai_tokenizer, learned):
            assert tokenizer._array_encoder.encode(text) == plain_ids(tokenizer, text)


@given(st.lists(texts | st.just(""), max_size=8))
def test_many_texts_are_each_encoded_alone(openai_tokenizer: GPT2Tokenizer, learned, some_texts: list[str]) -> None:
    for tokenizer in (openai_tokenizer, learned):
        packed = tokenizer._array_encoder.encode_each_packed(some_texts)
        assert list(map(tokenizer.unpack, packed)) == [plain_ids(tokenizer, text) for text in some_texts]


def test_every_end_and_beginning(openai_tokenizer: GPT2Tokenizer) -> None:
    """What ends one text and begins the next must know nothing of each other: spaces, contractions, words, characters."""
    ends = ["", " ", "  ", "\n", " \n", "a", "a ", "'", " '", "1", ".", "é", "龍", "\u3000", "🦙"]
    begins = ["", " ", "  ", "\n", "s", "'s", "ll", "'", " a", "a", "1", ".", "é", "喚", "\u3000", "🦙"]
    some_texts = [text for end in ends for begin in begins for text in (f"x{end}", f"{begin}y", end, begin)]
    packed = openai_tokenizer._array_encoder.encode_each_packed(some_texts)
    assert list(map(openai_tokenizer.unpack, packed)) == [plain_ids(openai_tokenizer, text) for text in some_texts]


@pytest.mark.usefixtures("_small")
def test_full_tables_start_over(openai_tokenizer: GPT2Tokenizer) -> None:
    """Many more pieces than there is room for: short, long and very long ones, again and again."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdeé人", k=generator.choice([1, 3, 9, 20, 33, 50]))) for _ in range(500)]
    text = " ".join(generator.choices(words, k=1000))
    array_encoder = GPT2Tokenizer.from_pretrained("gpt2")._array_encoder
    for _ in range(2):
        assert array_encoder.encode(text) == plain_ids(openai_tokenizer, text)
    assert all(table.n_pieces <= 64 for table in array_encoder._tables)
    assert len(array_encoder._long_pieces) <= 64


def test_packed_ids_are_the_same(openai_tokenizer: GPT2Tokenizer) -> None:
    packed = openai_tokenizer._array_encoder.encode_packed(TRAINING_TEXT)
    assert np.frombuffer(packed, np.uint32).tolist() == openai_tokenizer._array_encoder.encode(TRAINING_TEXT)
    assert openai_tokenizer._array_encoder.encode("") == [] and openai_tokenizer._array_encoder.encode_packed("") == b""


def test_merges_in_an_order_that_no_one_learned_are_left_to_the_plain_path(learned: GPT2Tokenizer) -> None:
    merges = learned._vocabulary.merges
    turned = GPT2Tokenizer(replace(learned._vocabulary, merges=merges[::-1]))
    assert turned._array_encoder is None
    text = TRAINING_TEXT * 300
    assert turned.encode(text) == plain_ids(turned, text)


def test_threads_share_one_encoder(openai_tokenizer: GPT2Tokenizer) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    rows = [[f"{name}{n} " for n in range(5_000)] for name in ("one", "two", "drei", "vier")]
    expected = [plain_ids(openai_tokenizer, "".join(row)) for row in rows]
    found: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda at=at, row=row: found.__setitem__(at, tokenizer.encode("".join(row))))
        for at, row in enumerate(rows)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at] for at in range(4)] == expected


def test_an_encoder_needs_merges_that_fit_its_table(learned: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_MAX_IDS", 100)
    assert ArrayEncoder.of(learned._merger, list(range(256)), list) is None
