"""Where two characters can be told apart because no token joins them. It knows the bytes of tokens, not their merges.

A merge gives an id whose bytes are a token. So where no token holds the end of one character and the beginning of the
next, no merge ever goes across, and the text in front and the text behind may be encoded apart. GPT-2's tokens join
characters beyond ASCII in a few scripts only; words of all others come apart into characters, of which there are few.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import pairwise

from gpt_encoder.split_pattern import basic_plane_pattern, split, split_with

# What is left whole, in a set of `re`: ASCII because its tokens are words, and beyond the basic plane because it is rare.
_UNCUT = r"\x00-\x7f\U00010000-\U0010ffff"

# The patterns take some hundredths of a second to make, which a text with a few accents need not wait for.
_WORTH_PATTERNS = 1 << 14


class Splitter:
    """Cuts text into parts whose ids, one after the other, are the ids of the text.

    `tokens` gives the bytes of all tokens beyond ASCII that merges make, when enough text beyond ASCII has come.
    """

    def __init__(self, tokens: Callable[[], Iterable[bytes]]) -> None:
        self._tokens = tokens
        self._length_beyond_ascii = 0
        self._plane_pattern: re.Pattern[str] | None = None
        self._cut_pattern: re.Pattern[str] | None = None

    def split(self, text: str) -> list[str]:
        """The pieces of `text`, some of them in parts."""
        if self._plane_pattern is not None:
            return split_with(self._plane_pattern, text)
        if not text.isascii():
            self._length_beyond_ascii += len(text)
            if self._length_beyond_ascii > _WORTH_PATTERNS:
                joined = joined_pattern(self._tokens())
                self._plane_pattern, self._cut_pattern = basic_plane_pattern(joined), cut_pattern(joined)
                return self.split(text)
        return split(text)

    def cut(self, piece: str) -> list[str]:
        """The parts of a piece."""
        return [piece] if self._cut_pattern is None else self._cut_pattern.findall(piece)


def joined_pattern(tokens: Iterable[bytes]) -> str:
    """A pattern for a character that one of `tokens` may join to the one in front.

    Of a character at its end a token may have a few bytes only; then all characters of the basic plane with these bytes
    are meant.
    """
    in_front, behind = {_UNCUT}, {_UNCUT}
    for token in tokens:
        starts = [at for at in range(1, len(token)) if not _is_continuation(token[at])]
        for start, end in pairwise([*starts, len(token)]):
            before = start - 1
            while before and _is_continuation(token[before]):
                before -= 1
            in_front.add(_characters_ending(token[before:start]))
            behind.add(_characters_beginning(token[start:end]))
    return f"(?<=[{''.join(in_front)}])[{''.join(behind)}]"


def cut_pattern(joined: str) -> re.Pattern[str]:
    """A pattern that finds text up to the next character that is not `joined` to the one in front."""
    return re.compile(f"(?:[{_UNCUT}]++|.)(?:{joined}[{_UNCUT}]*+)*+", re.DOTALL)


def _is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _characters_ending(tail: bytes) -> str:
    """The characters whose UTF-8 ends so, in a set of `re`."""
    if not _is_continuation(tail[0]):
        return _characters_beginning(tail)
    low_bits = 0
    for byte in tail:
        low_bits = low_bits << 6 | byte & 0x3F
    return "".join(chr(point) for point in range(low_bits, 0x10000, 1 << 6 * len(tail)) if point > 0x7F)


def _characters_beginning(head: bytes) -> str:
    """The characters whose UTF-8 begins so, in a set of `re`; of bytes that begin none, perhaps some others."""
    length = 2 if head[0] < 0xE0 else 3
    if head[0] < 0x80 or head[0] > 0xEF or len(head) > length:  # left whole anyway, or no character
        return ""
    bits = head[0] & (0x1F if length == 2 else 0x0F)
    for byte in head[1:]:
        bits = bits << 6 | byte & 0x3F
    free = 6 * (length - len(head))
    first = max(bits << free, 0x80)
    return f"{chr(first)}-{chr(max(first, ((bits + 1) << free) - 1))}"
