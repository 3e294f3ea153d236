"""CharacterCuts: find places between characters that no token spans. It knows the bytes of tokens, not their merges.

Every merge makes a token. So if no token contains the end of one character and the start of the next, no merge spans the
two, and the text before and after can be encoded separately. Beyond ASCII, GPT-2's tokens span characters in only a few
scripts. Pieces of Chinese text are rarely repeated; the cuts split them into characters, which are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

from gpt_encoder.arrays import Bytes, Flags, Numbers, Points
from gpt_encoder.arrays.piece_starts import TEXT_END

# All characters beyond the basic plane share the last row of the tables. They are treated as joined to every neighbour.
_BEYOND = 0x10000
_ANY_FIRST, _ANY_SECOND, _ASCII = (np.uint32(1 << bit) for bit in range(3))
_FREE_BITS = 29


class CharacterCuts:
    """Finds the cuts with two bit sets per character: one for it as the first of two characters, one for it as the second.

    Two characters may be cut apart if the first set of one and the second set of the other share no bit. `tokens` are the
    bytes of all tokens that merges make. The bit of two joined characters is a hash of the first byte of each. So a few
    characters count as joined although no token spans them, which costs time but does not change the ids.
    """

    def __init__(self, tokens: Iterable[bytes]) -> None:
        self._as_first = np.full(_BEYOND + 1, _ANY_FIRST)
        self._as_second = np.full(_BEYOND + 1, _ANY_SECOND)
        for table in (self._as_first, self._as_second):
            table[:0x80] |= _ASCII
            table[_BEYOND] = np.uint32(0xFFFFFFFF)
        first_bytes = _first_bytes(np.arange(_BEYOND, dtype=np.uint32))
        for front, back in {pair for token in tokens if not token.isascii() for pair in _neighbours(token)}:
            fronts, backs = _ending(front), _beginning(back)
            bits = np.uint32(8) << ((7 * first_bytes[fronts] + back[0]) % _FREE_BITS)
            self._as_first[fronts] |= bits
            self._as_second[backs] |= np.bitwise_or.reduce(bits)

    def starts(self, first_bytes: Bytes, points_beyond_ascii: Points) -> Flags:
        """For each character, whether certainly no token spans it and the previous one. Arguments as in `piece_starts`."""
        starts = np.zeros(len(first_bytes), np.bool_)
        points = first_bytes.astype(np.uint32)
        beyond_ascii = (first_bytes >= 0x80) & (first_bytes != TEXT_END)
        points[beyond_ascii] = np.minimum(points_beyond_ascii, _BEYOND)
        at = 1 + np.flatnonzero(beyond_ascii[:-1] | beyond_ascii[1:])
        starts[at] = (self._as_first.take(points[at - 1]) & self._as_second.take(points[at])) == 0
        return starts


def _neighbours(token: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The bytes in `token` of each two adjacent characters. Those of its first and last character may be incomplete."""
    begins = [at for at in range(1, len(token)) if not _is_continuation(token[at])]
    characters = [token[start:end] for start, end in pairwise([0, *begins, len(token)])]
    return pairwise(characters)


def _is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _ending(tail: bytes) -> Numbers:
    """The code points of the basic plane whose UTF-8 ends with `tail`."""
    if not _is_continuation(tail[0]):
        return _beginning(tail)
    low_bits = 0
    for byte in tail:
        low_bits = low_bits << 6 | byte & 0x3F
    points = np.arange(low_bits, _BEYOND, 1 << 6 * len(tail))
    return points[points >= 0x80]


def _beginning(head: bytes) -> Numbers:
    """The code points of the basic plane whose UTF-8 begins with `head`; arbitrary if `head` is not the start of UTF-8."""
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
    """The first byte of the UTF-8 of each code point of the basic plane."""
    return np.where(points < 0x80, points, np.where(points < 0x800, 0xC0 | points >> 6, 0xE0 | points >> 12))
