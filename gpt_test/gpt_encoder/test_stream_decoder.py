"""StreamDecoder: its pieces join to the decoded text, and no piece contains an incomplete character."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpt_encoder import CharTokenizer, GPT2Tokenizer, StreamDecoder


@given(st.lists(st.integers(0, 50256), max_size=30) | st.lists(st.integers(0, 255), max_size=30))
def test_pieces_join_to_decode(openai_tokenizer: GPT2Tokenizer, ids: list[int]) -> None:
    stream = StreamDecoder(openai_tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == openai_tokenizer.decode(ids)


@given(st.text(max_size=30))
def test_valid_text_never_shows_a_replacement(openai_tokenizer: GPT2Tokenizer, text: str) -> None:
    stream, shown = StreamDecoder(openai_tokenizer), ""
    for token in openai_tokenizer.encode(text):
        shown += stream.push(token)
        assert text.startswith(shown)
    assert shown == text and stream.flush() == ""


def test_an_incomplete_character_is_held_back(openai_tokenizer: GPT2Tokenizer) -> None:
    stream = StreamDecoder(openai_tokenizer)
    first, *_ = openai_tokenizer.encode("🦙")
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(openai_tokenizer.encode("a")[0]) == "a"  # ready for the next text


def test_a_char_tokenizer_can_be_streamed() -> None:
    tokenizer = CharTokenizer.from_texts(["añ🦙"])
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in tokenizer.encode("🦙ña")] == ["🦙", "ñ", "a"]
