"""train_bpe: its incremental algorithm learns the same merges as a direct implementation of the rule."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt_config import ConfigError, InputTypeError
from gpt_encoder import GPT2Tokenizer, train_bpe
from gpt_encoder.interface import EOT_TOKEN
from gpt_encoder.vocab_files import CHARACTER_OF_BYTE
from gpt_test.conftest import TRAINING_TEXT


def learn_plainly(tokenizer: GPT2Tokenizer, text: str, n_merges: int) -> list[tuple[int, int]]:
    """The merges by the literal rule: recount all pairs for each merge and merge the most frequent one.

    Ties go to the pair with the lowest ids. `<|endoftext|>` splits the text and is not learned.
    """
    byte_ids = {byte: token_id for token_id, byte in enumerate(CHARACTER_OF_BYTE)}
    pieces = [piece for part in text.split(EOT_TOKEN) for piece in tokenizer.split(part)]
    words = [[byte_ids[byte] for byte in piece.encode()] for piece in pieces]
    merges: list[tuple[int, int]] = []
    while len(merges) < n_merges:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            at = 0
            while at + 1 < len(word):
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = [256 + len(merges)]
                at += 1
        merges.append(best)
    return merges


@given(st.text(st.sampled_from("abc  \n🦙"), max_size=120) | st.text(max_size=60))
@example(f"abab{EOT_TOKEN}ab<|")
@pytest.mark.filterwarnings("ignore:the text has pairs for")
def test_merges_are_those_of_the_rule(text: str) -> None:
    learned = train_bpe([text], 256 + 1 + 20)
    expected = learn_plainly(learned, text, 20)
    assert list(learned.merger.ranks) == expected


def test_ids_are_laid_out_as_in_openais_vocabulary(small_tokenizer: GPT2Tokenizer, openai_tokenizer: GPT2Tokenizer) -> None:
    assert all(small_tokenizer.token_bytes[i] == openai_tokenizer.token_bytes[i] for i in range(256))
    assert small_tokenizer.eot_token_id == small_tokenizer.vocab_size - 1 == 299


@given(st.text())
def test_any_text_round_trips(small_tokenizer: GPT2Tokenizer, text: str) -> None:
    assert small_tokenizer.decode(small_tokenizer.encode(text)) == text


def test_texts_are_an_iterable_and_their_order_does_not_matter() -> None:
    lines = TRAINING_TEXT.splitlines(keepends=True)
    a, b = train_bpe(iter(lines), 290), train_bpe(reversed(lines), 290)
    assert a.encode(TRAINING_TEXT) == b.encode(TRAINING_TEXT) == train_bpe(TRAINING_TEXT, 290).encode(TRAINING_TEXT)


def test_special_tokens_are_boundaries() -> None:
    tokenizer = train_bpe(["<|endoftext|>" * 100 + "ab ab ab"], 259)
    assert tokenizer.encode("ab") == [257 - 1]
    assert all(b"end" not in token for i, token in tokenizer.token_bytes.items() if i != tokenizer.eot_token_id)


def test_too_little_text_gives_a_warning() -> None:
    with pytest.warns(UserWarning, match="258 tokens only, not 4096"):
        assert train_bpe(["ab"], 4096).vocab_size == 258


@pytest.mark.parametrize("vocab_size", [0, 256, "300", 300.0])
def test_a_vocab_size_that_is_too_small_is_an_error(vocab_size: object) -> None:
    with pytest.raises(ConfigError, match="257 or more"):
        train_bpe(["a"], vocab_size)


def test_wrong_input_is_an_error() -> None:
    with pytest.raises(InputTypeError, match="not bytes"):
        train_bpe([b"bytes"], 300)
    for special_tokens in ("<a>", None, 5, [1], [""], [["a"]]):
        with pytest.raises(InputTypeError, match="special"):
            train_bpe(["a"], 300, special_tokens=special_tokens)
    with pytest.raises(InputTypeError, match="iterable"):
        train_bpe(5, 300)
    with pytest.raises(ConfigError, match="twice"):
        train_bpe(["a"], 300, special_tokens=["x", "x"])
    with pytest.raises(ConfigError, match="is also an ordinary token"):
        train_bpe(["a"], 300, special_tokens=["a"])
