"""Where no token joins a character to the one in front of it. It knows the bytes of tokens, not their merges.

A merge makes a token. So where no token holds the end of one character and the beginning of the next, nothing is ever
merged across, and both sides may be encoded apart. Beyond ASCII, GPT-2's tokens join characters in a few scripts only:
rows of Chinese, of which no two are alike, come apart into characters, which do come again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

from gpt_encoder.arrays import Bytes, Flags, Numbers, Points
from gpt_encoder.arrays.piece_starts import TEXT_END

# All characters beyond the basic plane share the last row of the tables, and are taken to be joined to everything.
_BEYOND = 0x10000
_ANY_IN_FRONT, _ANY_BEHIND, _ASCII = (np.uint32(1 << bit) for bit in range(3))
_FREE_BITS = 29


class CharacterCuts:
    """For each character two sets of bits: one in front and one behind may be joined if they share a bit.

    `tokens` are the bytes of all tokens that merges make. Which bit tells of a token's join is a hash of the first bytes
    of both characters, so a few are said to be joined that are not: that costs time, and changes no ids.
    """

    def __init__(self, tokens: Iterable[bytes]) -> None:
        self._in_front = np.full(_BEYOND + 1, _ANY_IN_FRONT)
        self._behind = np.full(_BEYOND + 1, _ANY_BEHIND)
        for table in (self._in_front, self._behind):
            table[:0x80] |= _ASCII
            table[_BEYOND] = np.uint32(0xFFFFFFFF)
        first_bytes = _first_bytes(np.arange(_BEYOND, dtype=np.uint32))
        for front, back in {pair for token in tokens if not token.isascii() for pair in _neighbours(token)}:
            fronts, backs = _ending(front), _beginning(back)
            bits = np.uint32(8) << ((7 * first_bytes[fronts] + back[0]) % _FREE_BITS)
            self._in_front[fronts] |= bits
            self._behind[backs] |= np.bitwise_or.reduce(bits)

    def starts(self, first_bytes: Bytes, points_beyond_ascii: Points) -> Flags:
        """For each character, whether it is known that no token joins it to the one in front. As in `piece_starts`."""
        starts = np.zeros(len(first_bytes), np.bool_)
        points = first_bytes.astype(np.uint32)
        beyond_ascii = (first_bytes >= 0x80) & (first_bytes != TEXT_END)
        points[beyond_ascii] = np.minimum(points_beyond_ascii, _BEYOND)
        at = 1 + np.flatnonzero(beyond_ascii[:-1] | beyond_ascii[1:])
        starts[at] = (self._in_front.take(points[at - 1]) & self._behind.take(points[at])) == 0
        return starts


def _neighbours(token: bytes) -> Iterator[tuple[bytes, bytes]]:
    """What `token` holds of each two characters in a row: of the first and the last perhaps a part."""
    begins = [at for at in range(1, len(token)) if not _is_continuation(token[at])]
    characters = [token[start:end] for start, end in pairwise([0, *begins, len(token)])]
    return pairwise(characters)


def _is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _ending(tail: bytes) -> Numbers:
    """The code points of the basic plane whose UTF-8 ends so."""
    if not _is_continuation(tail[0]):
        return _beginning(tail)
    low_bits = 0
    for byte in tail:
        low_bits = low_bits << 6 | byte & 0x3F
    points = np.arange(low_bits, _BEYOND, 1 << 6 * len(tail))
    return points[points >= 0x80]


def _beginning(head: bytes) -> Numbers:
    """The code points of the basic plane whose UTF-8 begins so; of bytes that begin none, none or some others."""
    if head[0] < 0x80:
        return np.array([head[0]])
    length = 2 if head[0] < 0xE0 else 3
    if head[0] > 0xEF or len(head) > length:
        return np.array([], np.int64)
    bits = head[0] & (0x1F if length == 2 else 0x0F)
    for byte in head[1:]:
        bits = bits << 6 | byte & 0x3F
    free = 6 * (length - len(head))
    return np.arange(bits << free, (bits + 1) << free)


def _first_bytes(points: Points) -> Points:
    """The first byte of each code point's UTF-8, in the basic plane."""
    return np.where(points < 0x80, points, np.where(points < 0x800, 0xC0 | points >> 6, 0xE0 | points >> 12))
