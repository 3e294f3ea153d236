"""The fast patterns find the pieces of GPT-2's own pattern: any text, and every character of the basic plane."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt_encoder.split_pattern import SPLIT_PATTERN, basic_plane_pattern, blocks, split, split_with

any_character = st.characters(exclude_categories=[])
# Kinds and neighbours that the pattern treats unlike, and characters beyond the basic plane of each kind.
tricky = st.sampled_from(
    " \n\t\r\x0b\x1c\x85\xa0\u2003\u3000'sdlvret.,-!aZ19é字のーⅧ²\u0301\u200d\ufffd\U0001f999\U00020000\U0001d7d8\ud83e"
)
texts = st.text(tricky, max_size=40) | st.text(any_character, max_size=60) | st.text(st.characters(max_codepoint=127))


@given(texts)
@example("'s''s 's !'s")
@example("\x1c \x1c\U0001f999 a")
def test_pieces_are_those_of_the_pattern(text: str) -> None:
    expected = SPLIT_PATTERN.findall(text)
    assert "".join(expected) == text
    assert split(text) == expected
    assert split_with(PLANE, text) == expected


PLANE = basic_plane_pattern()


@pytest.mark.parametrize("around", ["{0}", " {0}{0}", "a{0}a", "1{0}1", ".{0}.", "{0}'s", "\n{0} \n"])
def test_every_character_of_the_basic_plane(around: str) -> None:
    for first in range(0, 0x10000, 0x1000):
        text = "".join(around.format(chr(point)) for point in range(first, first + 0x1000))
        assert split_with(PLANE, text) == SPLIT_PATTERN.findall(text), hex(first)
        if first == 0:
            ascii_text = "".join(around.format(chr(point)) for point in range(0x80))
            assert split(ascii_text) == SPLIT_PATTERN.findall(ascii_text)


@given(texts, st.integers(0, 20))
def test_blocks_end_where_pieces_end(text: str, length: int) -> None:
    parts = list(blocks(text, length))
    assert "".join(parts) == text
    assert [piece for part in parts for piece in SPLIT_PATTERN.findall(part)] == SPLIT_PATTERN.findall(text)
