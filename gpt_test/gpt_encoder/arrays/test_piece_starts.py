"""piece_starts: the same pieces as from the split pattern itself."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpt_encoder.arrays.piece_starts import LOOK_AHEAD, piece_starts
from gpt_encoder.tokenizer import split_pieces

# A blank, a line end, a space beyond ASCII, letters of contractions, a number, others, and one beyond the basic plane.
CHARACTERS = " \n\u3000'slve1.é🦙"


def starts_of(text: str) -> np.ndarray:
    first_bytes = np.array([character.encode()[0] for character in text], np.uint8)
    return piece_starts(first_bytes, np.array([ord(character) for character in text if character > "\x7f"], np.uint32))


def pieces_of(text: str) -> list[str]:
    starts = np.flatnonzero(starts_of(text)).tolist()
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def test_every_short_text() -> None:
    for length in (1, 2, 3):
        for characters in product(CHARACTERS, repeat=length):
            text = "".join(characters)
            assert pieces_of(text) == split_pieces(text), repr(text)


@given(st.text(CHARACTERS, min_size=1, max_size=60) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text(text: str) -> None:
    assert pieces_of(text) == split_pieces(text)


def test_every_code_point_has_the_kind_that_the_pattern_gives_it() -> None:
    """Each code point follows a letter, a number, a point and a space. U+40000 to U+DFFFF are not assigned."""
    for first in (*range(0, 0x40000, 0x800), 0xE0000):
        points = [point for point in range(first, first + 0x800) if not 0xD800 <= point < 0xE000]
        text = "".join(f"a{chr(point)}1{chr(point)}.{chr(point)}\t" for point in points)
        if text:
            assert pieces_of(text) == split_pieces(text), hex(first)


@given(st.text(CHARACTERS, min_size=1, max_size=30), st.text(CHARACTERS, max_size=5))
def test_more_text_changes_only_the_last_characters(text: str, more: str) -> None:
    known = max(0, len(text) - LOOK_AHEAD)
    assert starts_of(text)[:known].tolist() == starts_of(text + more)[:known].tolist()
