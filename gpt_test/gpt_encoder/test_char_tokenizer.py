"""CharTokenizer: one token per character, with the interface of Tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_config import InputError, InputTypeError, VocabularyError
from gpt_encoder import CharTokenizer, load_tokenizer

text_without_surrogates = st.text(min_size=1)


@given(text_without_surrogates)
def test_round_trip(text: str) -> None:
    tokenizer = CharTokenizer.from_texts([text])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text)) + 1
    assert tokenizer.eot_token_id == len(set(text))


def test_files_round_trip(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_texts(["To be\n", "or not 🦙"])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, CharTokenizer) and loaded.characters == tokenizer.characters


def test_special_tokens_and_tensors() -> None:
    tokenizer = CharTokenizer.from_texts("<|endoftx>")
    assert tokenizer.encode("<|endoftext|>", allowed_special="all") == [tokenizer.eot_token_id]
    assert len(tokenizer.encode("<|endoftext|>")) == 13
    assert tokenizer.encode("to", return_tensors="pt").shape == (1, 2)


def test_the_error_names_an_unknown_character() -> None:
    with pytest.raises(InputError, match=r"'é' \(U\+00E9\) is not among the 3"):
        CharTokenizer.from_texts("abc").encode("cabé")
    with pytest.raises(InputTypeError):
        CharTokenizer.from_texts("abc").encode(b"a")


@pytest.mark.parametrize("content", ["[]", "{}", "[1]", '["ab"]', '["\\ud800"]', "[", ""])
def test_broken_files_are_errors(content: str, tmp_path: Path) -> None:
    (tmp_path / "char_vocab.json").write_text(content)
    with pytest.raises(VocabularyError):
        load_tokenizer(tmp_path)


def test_wrong_types_are_errors() -> None:
    for characters in (["a", 1], [["a"]], ["ab"], []):
        with pytest.raises(VocabularyError):
            CharTokenizer(characters)
    for texts in ([1], [None], [b"ab"]):
        with pytest.raises(InputTypeError, match="must be str"):
            CharTokenizer.from_texts(texts)
