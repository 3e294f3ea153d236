"""ArrayDecoder: many ids to their bytes at once. It knows the bytes of each id, and nothing of text."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

# Bytes are copied eight at a time, as words, more than most tokens have: what is too much comes to lie where the next token
# begins, and is written over by that.
_WORD = 8
# Ids worked on at a time, so that the arrays fit the processor's cache; of short tokens twice as many.
_BLOCK = 1 << 14
_MAX_IDS = 1 << 20

# To write a word takes longer than to join two. So tokens of so few bytes on average are joined in fours, and of so few in
# twos: Thai has 1.5, Japanese 2.2, and English 4.3.
_BYTES_FOR_FOURS, _BYTES_FOR_TWOS = 1.9, 2.8
# The average of so many ids tells.
_SAMPLE = 512


class ArrayDecoder:
    """The bytes of all tokens in one row, and where each begins."""

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._n_ids = min(_MAX_IDS, 1 + max(token_bytes))
        tokens = [token_bytes.get(token_id) for token_id in range(self._n_ids)]
        self._is_missing = np.array([token is None for token in tokens])
        self._has_gaps = bool(self._is_missing.any())
        data = [token or b"" for token in [*tokens, b""]]  # the last is no token, but fills a block
        lengths = np.array(list(map(len, data)), np.int64)
        self._bits = 8 * lengths
        self._begins = np.cumsum(lengths) - lengths
        self._bytes = _places(bytearray(b"".join(data) + bytes(_WORD)))
        first_bytes = b"".join(token[:_WORD].ljust(_WORD, b"\0") for token in data)
        self._words = np.frombuffer(first_bytes, "<i8").astype(np.int64)

    def decode(self, ids: list[int]) -> bytes | None:
        """The bytes of `ids`; None if one of them is no int, is not in the vocabulary, or is very large."""
        try:
            numbers = np.frombuffer(array("I", ids), np.uint32)
        except (OverflowError, TypeError):
            return None
        if numbers.max(initial=0) >= self._n_ids or (self._has_gaps and self._is_missing[numbers].any()):
            return None
        sample = self._bits[numbers[:: len(ids) // _SAMPLE + 1]]
        n_bytes = sample.sum() / (8 * max(1, len(sample)))
        n_joins = 2 if n_bytes < _BYTES_FOR_FOURS else 1 if n_bytes < _BYTES_FOR_TWOS else 0
        size = _BLOCK << (n_joins > 0)
        blocks = (numbers[at : at + size].astype(np.int64) for at in range(0, len(ids), size))
        return b"".join([self._decode_block(block, n_joins) for block in blocks])

    def _decode_block(self, ids: npt.NDArray[np.int64], n_joins: int) -> memoryview:
        """The bytes of `ids`, all of which have an entry in the tables; words are joined in twos as often as it says."""
        if len(ids) % 4:
            ids = np.append(ids, [self._n_ids] * (-len(ids) % 4))
        words, bits = self._words.take(ids, mode="clip"), self._bits.take(ids, mode="clip")  # "clip" only for speed
        parts = []
        for _ in range(n_joins):
            parts.append((words, bits))
            words = words[::2] | words[1::2] << bits[::2]  # 0 where there is no room
            bits = bits[::2] + bits[1::2]
        lengths = bits >> 3
        ends = np.cumsum(lengths)
        targets = ends - lengths
        writes = [(targets, words)]
        # Where a word does not hold all, its second part has one of its own.
        longer = np.flatnonzero(bits > 8 * _WORD)
        longer_at = targets[longer]
        for part_words, part_bits in reversed(parts):
            second_at = longer_at + (part_bits[2 * longer] >> 3)
            writes.append((second_at, part_words[2 * longer + 1]))
            halves, halves_at = np.stack([2 * longer, 2 * longer + 1], 1), np.stack([longer_at, second_at], 1)
            is_longer = part_bits[halves] > 8 * _WORD
            longer, longer_at = halves[is_longer], halves_at[is_longer]

        data = bytearray(int(ends[-1]) + _WORD)
        at_byte = _places(data)
        # What is behind comes first: what is too much of it is then written over, too.
        long_ids = ids[longer]
        n_bytes, begins = self._bits[long_ids] >> 3, self._begins[long_ids]
        for behind in range(_WORD, int(n_bytes.max(initial=0)), _WORD):
            more = n_bytes > behind
            at_byte[longer_at[more] + behind] = self._bytes[begins[more] + behind]
        for places, written in reversed(writes):
            at_byte[places] = written.astype("<i8", copy=False).view(at_byte.dtype)  # NumPy puts them down in this order
        return memoryview(data)[:-_WORD]


def _places(data: bytearray) -> npt.NDArray[np.void]:
    """For each place in `data` but the last ones, the word that begins there."""
    return np.ndarray((len(data) - _WORD + 1,), f"V{_WORD}", buffer=data, strides=(1,))
