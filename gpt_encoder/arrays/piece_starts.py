"""Find where GPT-2's split pattern starts a piece, for all characters of a text at once. It knows nothing of tokens.

The pattern is equivalent to these rules. Characters are of four kinds: letters, numbers, spaces and all others.
- A non-space starts a piece if the previous character is of another kind and not a blank. A blank is in the piece of the
  non-space that follows it.
- In a run of spaces the first one starts a piece. So does the last one if a non-space follows, because `\\s+(?!\\S)` does
  not match it.
- A contraction ('s 't 'd 'm 'll 've 're) is a piece if its apostrophe starts one. The next character starts another.
"""

from __future__ import annotations

import string
from functools import cache

import numpy as np

from gpt_encoder.arrays import Bytes, Flags, Points
from gpt_encoder.unicode_tables import kind_of_each_character

# Whether a character starts a piece depends on at most this many characters after it: the length of the longest contraction.
LOOK_AHEAD = 3

_BASIC_PLANE, _ALL_PLANES = 0x10000, 0x110000

# The end mark after each of several concatenated texts. UTF-8 does not use this byte.
TEXT_END = 0xFF

_LETTER, _NUMBER, _OTHER, _SPACE, _BLANK, _END = range(6)

_ONE_LETTER = np.frombuffer(b"sdmt", np.uint8)
_BEFORE_E = np.frombuffer(b"vr", np.uint8)


def piece_starts(first_bytes: Bytes, points_beyond_ascii: Points) -> Flags:
    """For each character of a text, whether it starts a piece (T,).

    `first_bytes` (T,) are the first bytes of the characters in UTF-8. `points_beyond_ascii` are the code points of the
    characters that are not ASCII. TEXT_END among the bytes marks the end of a text and is a separate piece. The result for
    the last LOOK_AHEAD characters is correct only if no text follows them.
    """
    kinds = np.frombuffer(bytearray(first_bytes.tobytes().translate(_kinds_of_first_bytes())), np.uint8)
    if len(points_beyond_ascii):
        end = _BASIC_PLANE if points_beyond_ascii.max() < _BASIC_PLANE else _ALL_PLANES
        kinds[(first_bytes >= 0x80) & (first_bytes != TEXT_END)] = _kinds_below(end).take(points_beyond_ascii)
    starts = np.empty(len(kinds), np.bool_)
    np.not_equal(kinds[1:], kinds[:-1], out=starts[1:])
    starts[1:] &= kinds[:-1] != _BLANK
    spaces_and_ends = kinds >= _SPACE
    spaces = spaces_and_ends & (kinds != _END)
    inside = spaces.copy()  # spaces between two spaces, or between a space and the end of the text
    inside[1:] &= spaces[:-1]
    inside[:-1] &= spaces_and_ends[1:]
    starts |= spaces_and_ends
    starts &= ~inside
    starts[:1] = True
    _set_contractions(starts, first_bytes)
    return starts


def _set_contractions(starts: Flags, first_bytes: Bytes) -> None:
    apostrophes = np.flatnonzero((first_bytes == ord("'")) & starts)
    if not len(apostrophes):
        return
    ended = np.append(first_bytes, np.zeros(2, np.uint8))
    first, second = ended[apostrophes + 1], ended[apostrophes + 2]
    one = np.isin(first, _ONE_LETTER)
    two = ((first == ord("l")) & (second == ord("l"))) | (np.isin(first, _BEFORE_E) & (second == ord("e")))
    for found, length in ((one, 2), (two, 3)):
        at = apostrophes[found]
        starts[at + 1] = False
        after = at + length
        starts[after[after < len(starts)]] = True


@cache
def _kinds_of_first_bytes() -> bytes:
    kinds = bytearray(0x100)
    kinds[:0x80] = _kinds_below(0x80).tobytes()
    kinds[TEXT_END] = _END
    return bytes(kinds)


@cache
def _kinds_below(end: int) -> Bytes:
    """The kind of each code point below `end`, from the tables of `unicode_tables`."""
    kind_of_ascii = np.full(0x80, _OTHER, np.uint8)
    for characters, kind in (
        (string.ascii_letters, _LETTER),
        (string.digits, _NUMBER),
        (string.whitespace, _SPACE),
        (" ", _BLANK),
    ):
        kind_of_ascii[[*characters.encode()]] = kind
    return kind_of_ascii.take(np.frombuffer(kind_of_each_character()[:end].encode("ascii"), np.uint8))
