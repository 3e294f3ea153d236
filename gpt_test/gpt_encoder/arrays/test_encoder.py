"""ArrayEncoder against the merge of each piece that the pattern finds."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_encoder import GPT2Tokenizer, train_bpe
from gpt_encoder.arrays import encoder, piece_table, text_cutter
from gpt_encoder.arrays.piece_table import IdPool
from gpt_encoder.vocab_files import CHARACTER_OF_BYTE, Vocabulary
from gpt_test.conftest import TRAINING_TEXT

SYMBOLS = [*" \n\u3000'st1.éя人のー龍🦙", "  ", "\n\n", "'ll", "'re", "Hello", " world", "internationalization", "=" * 40]
texts = st.lists(st.sampled_from(SYMBOLS), min_size=1, max_size=40).map("".join)


def plain_ids(tokenizer: GPT2Tokenizer, text: str) -> list[int]:
    return [token for piece in tokenizer.split(text) for token in tokenizer._merge_piece(piece)]


def unpacked(tokenizer: GPT2Tokenizer, packed: list[bytes]) -> list[list[int]]:
    return tokenizer.unpack_each(b"".join(packed), [len(ids) // 4 for ids in packed])


@pytest.fixture(scope="module")
def learned() -> GPT2Tokenizer:
    """A small vocabulary that joins characters of several scripts."""
    return train_bpe([f"{TRAINING_TEXT} 人のー龍🦙 人の人の éя éяé 🦙🦙 のー  \n\n" * 3], vocab_size=400)


@pytest.fixture(scope="module", autouse=True)
def _cuts_from_the_first_character() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_cutter, "_WORTH_CUTS", 1)
        yield


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
        patch.setattr(encoder, "_WINDOW_BEYOND_ASCII", 1 + window // 2)
        patch.setattr(encoder, "_SAMPLE", 3)
        for tokenizer in (openai_tokenizer, learned):
            assert tokenizer._array_encoder.encode(text) == plain_ids(tokenizer, text)


@given(st.lists(texts | st.just(""), max_size=8))
def test_many_texts_are_each_encoded_alone(openai_tokenizer: GPT2Tokenizer, learned, some_texts: list[str]) -> None:
    for tokenizer in (openai_tokenizer, learned):
        packed = tokenizer._array_encoder.encode_each_packed(some_texts)
        assert unpacked(tokenizer, packed) == [plain_ids(tokenizer, text) for text in some_texts]


def test_every_end_and_beginning(openai_tokenizer: GPT2Tokenizer) -> None:
    """What ends one text and begins the next must know nothing of each other: spaces, contractions, words, characters."""
    ends = ["", " ", "  ", "\n", " \n", "a", "a ", "'", " '", "1", ".", "é", "龍", "\u3000", "🦙"]
    begins = ["", " ", "  ", "\n", "s", "'s", "ll", "'", " a", "a", "1", ".", "é", "喚", "\u3000", "🦙"]
    some_texts = [text for end in ends for begin in begins for text in (f"x{end}", f"{begin}y", end, begin)]
    packed = openai_tokenizer._array_encoder.encode_each_packed(some_texts)
    assert unpacked(openai_tokenizer, packed) == [plain_ids(openai_tokenizer, text) for text in some_texts]


@pytest.mark.usefixtures("_small")
def test_full_tables_start_over(openai_tokenizer: GPT2Tokenizer) -> None:
    """Many more pieces than there is room for: short, long and very long ones, again and again."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdeé人", k=generator.choice([1, 3, 9, 20, 33, 50]))) for _ in range(300)]
    words += ["".join(generator.choices("abcde", k=40)) for _ in range(200)]
    text = " ".join(generator.choices(words, k=1000))
    array_encoder = GPT2Tokenizer.from_pretrained("gpt2")._array_encoder
    for _ in range(2):
        assert array_encoder.encode(text) == plain_ids(openai_tokenizer, text)
    assert all(table.n_pieces <= 64 for table in array_encoder._tables)
    assert len(array_encoder._long_pieces) <= 64


def test_few_characters_beyond_ascii_need_no_cuts(openai_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_cutter, "_WORTH_CUTS", 20)
    array_encoder = GPT2Tokenizer.from_pretrained("gpt2")._array_encoder
    for n, has_cuts in ((3, False), (3, False), (4, True), (3, True)):  # 6, 12, 20 and 26 characters in all
        text = "a\u4eba\u4e00" * n
        assert array_encoder.encode(text) == plain_ids(openai_tokenizer, text)
        assert (array_encoder._cutter._cuts is not None) is has_cuts


def test_packed_ids_are_the_same(openai_tokenizer: GPT2Tokenizer) -> None:
    packed = openai_tokenizer._array_encoder.encode_packed(TRAINING_TEXT)
    assert np.frombuffer(packed, np.uint32).tolist() == openai_tokenizer._array_encoder.encode(TRAINING_TEXT)
    assert openai_tokenizer._array_encoder.encode("") == [] and openai_tokenizer._array_encoder.encode_packed("") == b""


def test_merges_in_an_order_that_no_one_learned_are_left_to_the_plain_path(learned: GPT2Tokenizer) -> None:
    merges = learned.vocabulary.merges
    turned = GPT2Tokenizer(replace(learned.vocabulary, merges=merges[::-1]))
    assert turned._array_encoder is None
    text = TRAINING_TEXT * 300
    assert turned.encode(text) == plain_ids(turned, text)


@pytest.mark.parametrize("token", ["xyz", "\u4eba"])
@pytest.mark.parametrize("token_id", [400, 401, 5000])
def test_merges_of_tokens_that_never_come_up(learned: GPT2Tokenizer, token: str, token_id: int) -> None:
    """No merge makes the token, and its id may be higher than all others; or it is not of the printable alphabet."""
    vocabulary = learned.vocabulary
    token_ids = {**vocabulary.token_ids, token: token_id, f"{token}t": 402}
    odd = GPT2Tokenizer(replace(vocabulary, token_ids=token_ids, merges=[*vocabulary.merges, (token, "t")]))
    text = f"{token}t {token} \u4eba\u4eba t"
    assert odd._array_encoder.encode(text) == plain_ids(odd, text)


def test_few_merges() -> None:
    bytes_only = {token: token_id for token_id, token in enumerate(CHARACTER_OF_BYTE.values())}
    for merges in ([], [("l", "o")]):
        few = GPT2Tokenizer(Vocabulary(bytes_only | {"lo": 1000} if merges else bytes_only, merges))
        assert few._array_encoder.encode(TRAINING_TEXT) == plain_ids(few, TRAINING_TEXT)


def test_an_interrupted_encoder_gives_right_ids_afterwards(
    openai_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes when pieces have their numbers and not yet their ids."""
    array_encoder = GPT2Tokenizer.from_pretrained("gpt2")._array_encoder
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(IdPool, "add", Mock(side_effect=KeyboardInterrupt))  # a signal is ignored in some shells
        array_encoder.encode(TRAINING_TEXT)
    assert array_encoder.encode(TRAINING_TEXT) == plain_ids(openai_tokenizer, TRAINING_TEXT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_fork_waits_for_other_threads(openai_tokenizer: GPT2Tokenizer) -> None:
    """Else a child would wait for ever for a thread that it does not have."""
    at_work, released = threading.Event(), threading.Event()

    def work() -> None:
        with encoder._lock:
            at_work.set()
            time.sleep(0.1)
            released.set()

    thread = threading.Thread(target=work)
    thread.start()
    at_work.wait()
    child = os.fork()
    if not child:
        os._exit(0 if released.is_set() and not encoder._lock.locked() else 1)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert not encoder._lock.locked()


def test_very_long_pieces_are_not_kept(openai_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_MAX_POOL", 100)
    monkeypatch.setattr(piece_table, "_FIRST_POOL", 10)
    array_encoder = GPT2Tokenizer.from_pretrained("gpt2")._array_encoder
    text = "abcd" * 2000
    for _ in range(2):
        assert array_encoder.encode(text) == plain_ids(openai_tokenizer, text)
    assert not array_encoder._long_pieces
    array_encoder.encode("a")
    assert len(array_encoder._pool._ids) <= 20


@pytest.mark.parametrize("script", ["ASCII", "another"])
def test_windows_stay_small(script: str, openai_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a piece longer than a window needs a longer one; those behind it are as before."""
    monkeypatch.setattr(encoder, "_WINDOW" if script == "ASCII" else "_WINDOW_BEYOND_ASCII", 100)
    windows: list[int] = []
    cutter = openai_tokenizer._array_encoder._cutter
    cut = cutter.cut_window
    monkeypatch.setattr(
        cutter, "cut_window", lambda window, is_last: windows.append(len(window)) or cut(window, is_last=is_last)
    )
    text = " word" * 100 + "=" * 300 + " word" * 100
    if script == "another":
        text = text.translate({ord("w"): "щ", ord("o"): "п", ord("r"): "т", ord("d"): "д", ord("="): "、"})
    assert openai_tokenizer._array_encoder.encode(text) == plain_ids(openai_tokenizer, text)
    assert windows.count(100) > 10 and set(windows[:-1]) == {100, 200, 400} and windows.count(400) == 1


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
