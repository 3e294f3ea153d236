"""ArrayEncoder: the ids equal those of each piece of the pattern merged alone."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_encoder import GPT2Tokenizer, train_bpe
from gpt_encoder.arrays.batch_merger import BatchMerger
from gpt_encoder.arrays.encoder import ArrayEncoder, EncoderLimits
from gpt_encoder.arrays.piece_table import MergeOne
from gpt_encoder.arrays.text_cutter import Parts, TextCutter
from gpt_encoder.vocab_files import CHARACTER_OF_BYTE, Vocabulary, byte_token_ids, tokens_beyond_ascii
from gpt_test.conftest import TRAINING_TEXT

SYMBOLS = [*" \n\u3000'st1.éя人のー龍🦙", "  ", "\n\n", "'ll", "'re", "Hello", " world", "internationalization", "=" * 40]
texts = st.lists(st.sampled_from(SYMBOLS), min_size=1, max_size=40).map("".join)
# The first character beyond ASCII turns the cuts between characters on. By default a text must have 1024 of them.
LIMITS = EncoderLimits(worth_cuts=1)


def new_encoder(tokenizer: GPT2Tokenizer, limits: EncoderLimits = LIMITS) -> ArrayEncoder | None:
    """An encoder with an empty cache and the merges of `tokenizer`."""
    token_ids = tokenizer.vocabulary.token_ids
    return ArrayEncoder.of(tokenizer.merger, byte_token_ids(token_ids), lambda: tokens_beyond_ascii(token_ids), limits)


# One encoder for all texts of a test, so that its cache contains pieces of the previous texts.
shared_encoder = cache(new_encoder)


class RecordingCutter(TextCutter):
    """A TextCutter that records the length of each window, and the number of texts that it cuts together."""

    def __init__(self, tokenizer: GPT2Tokenizer) -> None:
        super().__init__(lambda: tokens_beyond_ascii(tokenizer.vocabulary.token_ids), LIMITS.worth_cuts)
        self.windows: list[int] = []
        self.texts: list[int] = []

    def cut_window(self, window: str, *, is_last: bool) -> tuple[Parts, int]:
        self.windows.append(len(window))
        return super().cut_window(window, is_last=is_last)

    def cut_texts(self, texts: Sequence[str]) -> tuple[Parts, np.ndarray]:
        self.texts.append(len(texts))
        return super().cut_texts(texts)


def encoder_from(
    tokenizer: GPT2Tokenizer, limits: EncoderLimits, cutter: TextCutter | None = None, merge_one: MergeOne | None = None
) -> ArrayEncoder:
    """A new encoder with the test's `cutter` or `merge_one`."""
    byte_ids = byte_token_ids(tokenizer.vocabulary.token_ids)
    merge_many = BatchMerger.of(tokenizer.merger.ranks, tokenizer.merger.merged_ids, byte_ids)
    return ArrayEncoder(cutter or RecordingCutter(tokenizer), merge_one or merge_piece_of(tokenizer), merge_many, limits)


def merge_piece_of(tokenizer: GPT2Tokenizer) -> MergeOne:
    byte_ids = byte_token_ids(tokenizer.vocabulary.token_ids)
    return lambda piece: tokenizer.merger.merge([byte_ids[byte] for byte in piece])


def plain_ids(tokenizer: GPT2Tokenizer, text: str) -> list[int]:
    return [token for piece in tokenizer.split(text) for token in tokenizer.merge_piece(piece)]


def unpacked(tokenizer: GPT2Tokenizer, packed: list[bytes]) -> list[list[int]]:
    return tokenizer.unpack_each(b"".join(packed), [len(ids) // 4 for ids in packed])


@pytest.fixture(scope="module")
def learned() -> GPT2Tokenizer:
    """A small vocabulary whose tokens join characters of several scripts."""
    return train_bpe([f"{TRAINING_TEXT} 人のー龍🦙 人の人の éя éяé 🦙🦙 のー  \n\n" * 3], vocab_size=400)


@given(texts, st.sampled_from([1, 2, 3, 7, 50, 1 << 19]))
def test_any_text_in_windows_of_any_length(openai_tokenizer: GPT2Tokenizer, learned, text: str, window: int) -> None:
    limits = replace(LIMITS, window=window, window_beyond_ascii=1 + window // 2, sample=3)
    for tokenizer in (openai_tokenizer, learned):
        assert shared_encoder(tokenizer, limits).encode(text) == plain_ids(tokenizer, text)


@given(st.lists(texts | st.just(""), max_size=8))
def test_texts_encoded_together_have_the_ids_of_each_alone(openai_tokenizer, learned, some_texts: list[str]) -> None:
    for tokenizer in (openai_tokenizer, learned):
        packed = shared_encoder(tokenizer).encode_each_packed(some_texts)
        assert unpacked(tokenizer, packed) == [plain_ids(tokenizer, text) for text in some_texts]


def test_no_piece_spans_two_texts(openai_tokenizer: GPT2Tokenizer) -> None:
    """The end of one text and the start of the next could form a run of spaces, a contraction, a word or a character."""
    ends = ["", " ", "  ", "\n", " \n", "a", "a ", "'", " '", "1", ".", "é", "龍", "\u3000", "🦙"]
    begins = ["", " ", "  ", "\n", "s", "'s", "ll", "'", " a", "a", "1", ".", "é", "喚", "\u3000", "🦙"]
    some_texts = [text for end in ends for begin in begins for text in (f"x{end}", f"{begin}y", end, begin)]
    packed = shared_encoder(openai_tokenizer).encode_each_packed(some_texts)
    assert unpacked(openai_tokenizer, packed) == [plain_ids(openai_tokenizer, text) for text in some_texts]


@pytest.mark.parametrize(("most_together", "together"), [(60_000, []), (1 << 21, [3])])
def test_very_long_texts_are_not_encoded_together(
    openai_tokenizer: GPT2Tokenizer, most_together: int, together: list[int]
) -> None:
    """A text without blanks is never split, however long it is, and would need gigabytes of arrays."""
    some_texts = ["a b", "\u4eba\u4e00" * 30_000, ""]
    cutter = RecordingCutter(openai_tokenizer)
    array_encoder = encoder_from(openai_tokenizer, replace(LIMITS, most_together=most_together), cutter)
    packed = array_encoder.encode_each_packed(some_texts)
    assert unpacked(openai_tokenizer, packed) == list(map(openai_tokenizer.encode, some_texts))
    assert cutter.texts == together


def test_full_tables_are_cleared(openai_tokenizer: GPT2Tokenizer) -> None:
    """The text has many more short, long and very long pieces than the tables have room for."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdeé人", k=generator.choice([1, 3, 9, 20, 33, 50]))) for _ in range(300)]
    words += ["".join(generator.choices("abcde", k=40)) for _ in range(200)]
    text = " ".join(generator.choices(words, k=1000))
    array_encoder = new_encoder(openai_tokenizer, replace(LIMITS, max_pieces=64, max_pieces_at_once=20, worth_batch=3))
    for _ in range(2):
        assert array_encoder.encode(text) == plain_ids(openai_tokenizer, text)
    assert 0 < array_encoder.remembered.n_pieces <= 64
    assert 0 < array_encoder.remembered.n_long_pieces <= 64


def test_few_characters_beyond_ascii_need_no_cuts(openai_tokenizer: GPT2Tokenizer) -> None:
    asked: list[list[bytes]] = []

    def tokens() -> list[bytes]:
        asked.append(tokens_beyond_ascii(openai_tokenizer.vocabulary.token_ids))
        return asked[-1]

    array_encoder = encoder_from(openai_tokenizer, LIMITS, TextCutter(tokens, worth_cuts=20))
    for n, has_cuts in ((3, False), (3, False), (4, True), (3, True)):  # 6, 12, 20 and 26 characters in total
        text = "a\u4eba\u4e00" * n
        assert array_encoder.encode(text) == plain_ids(openai_tokenizer, text)
        assert len(asked) == has_cuts


def test_encode_packed_gives_the_ids_of_encode(openai_tokenizer: GPT2Tokenizer) -> None:
    array_encoder = shared_encoder(openai_tokenizer)
    packed = array_encoder.encode_packed(TRAINING_TEXT)
    assert np.frombuffer(packed, np.uint32).tolist() == array_encoder.encode(TRAINING_TEXT)
    assert array_encoder.encode("") == [] and array_encoder.encode_packed("") == b""


def test_merges_in_an_order_that_no_training_produces_need_no_arrays(learned: GPT2Tokenizer) -> None:
    merges = learned.vocabulary.merges
    reversed_merges = GPT2Tokenizer(replace(learned.vocabulary, merges=merges[::-1]))
    assert new_encoder(reversed_merges) is None
    text = TRAINING_TEXT * 300
    assert reversed_merges.encode(text) == plain_ids(reversed_merges, text)


@pytest.mark.parametrize("token", ["xyz", "\u4eba"])
@pytest.mark.parametrize("token_id", [400, 401, 5000])
def test_merges_of_tokens_that_never_occur(learned: GPT2Tokenizer, token: str, token_id: int) -> None:
    """No merge makes the token. Its id may be higher than all others, or it may be outside the printable alphabet."""
    vocabulary = learned.vocabulary
    token_ids = {**vocabulary.token_ids, token: token_id, f"{token}t": 402}
    odd = GPT2Tokenizer(replace(vocabulary, token_ids=token_ids, merges=[*vocabulary.merges, (token, "t")]))
    text = f"{token}t {token} \u4eba\u4eba t"
    assert new_encoder(odd).encode(text) == plain_ids(odd, text)


def test_few_merges() -> None:
    bytes_only = {token: token_id for token_id, token in enumerate(CHARACTER_OF_BYTE.values())}
    for merges in ([], [("l", "o")]):
        few = GPT2Tokenizer(Vocabulary(bytes_only | {"lo": 1000} if merges else bytes_only, merges))
        assert new_encoder(few).encode(TRAINING_TEXT) == plain_ids(few, TRAINING_TEXT)


def test_an_interrupted_encoder_gives_right_ids_afterwards(openai_tokenizer: GPT2Tokenizer) -> None:
    """KeyboardInterrupt is raised when new pieces are in the table and their ids are not yet in the pool."""
    merge = merge_piece_of(openai_tokenizer)
    merged: list[bytes] = []

    def interrupted(piece: bytes) -> Sequence[int]:
        merged.append(piece)
        if len(merged) == 3:  # raised directly, because some shells ignore the signal
            raise KeyboardInterrupt
        return merge(piece)

    array_encoder = encoder_from(openai_tokenizer, LIMITS, merge_one=interrupted)
    with pytest.raises(KeyboardInterrupt):
        array_encoder.encode(TRAINING_TEXT)
    assert array_encoder.encode(TRAINING_TEXT) == plain_ids(openai_tokenizer, TRAINING_TEXT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_waits_for_other_threads(openai_tokenizer: GPT2Tokenizer) -> None:
    """Otherwise the child would wait forever for a lock of a thread that it does not have."""
    at_work, released = threading.Event(), threading.Event()
    merge = merge_piece_of(openai_tokenizer)

    def slowly(piece: bytes) -> Sequence[int]:
        if not released.is_set():
            at_work.set()
            time.sleep(0.1)
            released.set()
        return merge(piece)

    array_encoder = encoder_from(openai_tokenizer, LIMITS, merge_one=slowly)
    thread = threading.Thread(target=array_encoder.encode, args=["Hello"])
    thread.start()
    at_work.wait()
    child = os.fork()
    if not child:
        signal.alarm(120)  # ends a child that waits forever
        os._exit(0 if released.is_set() and array_encoder.encode("Hello") == [15496] else 1)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    after_fork = threading.Thread(target=array_encoder.encode, args=["Hello"], daemon=True)
    after_fork.start()
    after_fork.join(timeout=120)
    assert not after_fork.is_alive()


def test_very_long_pieces_are_not_cached(openai_tokenizer: GPT2Tokenizer) -> None:
    array_encoder = new_encoder(openai_tokenizer, replace(LIMITS, max_ids=100, first_ids=10))
    text = "abcd" * 2000
    for _ in range(2):
        assert array_encoder.encode(text) == plain_ids(openai_tokenizer, text)
    assert array_encoder.remembered.n_long_pieces == 0
    array_encoder.encode("a")
    assert array_encoder.remembered.id_capacity <= 20


@pytest.mark.parametrize("script", ["ASCII", "another"])
def test_windows_stay_small(script: str, openai_tokenizer: GPT2Tokenizer) -> None:
    """Only a piece longer than a window needs a longer window; the windows after it have the normal length."""
    limits = replace(LIMITS, **{"window" if script == "ASCII" else "window_beyond_ascii": 100})
    cutter = RecordingCutter(openai_tokenizer)
    text = " word" * 100 + "=" * 300 + " word" * 100
    if script == "another":
        text = text.translate({ord("w"): "щ", ord("o"): "п", ord("r"): "т", ord("d"): "д", ord("="): "、"})
    assert encoder_from(openai_tokenizer, limits, cutter).encode(text) == plain_ids(openai_tokenizer, text)
    windows = cutter.windows
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
