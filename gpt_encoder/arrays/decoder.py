"""ArrayDecoder: many ids to their bytes at once. It knows the bytes of each id, and nothing of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpt_config.collector import collector_paused
from gpt_encoder.arrays import from_list

# Bytes are copied eight at a time, as words, or two words at once: more than most tokens have. What is too much comes to
# lie where the next token begins, and is written over by that.
_WORD = 8
# The average length of tokens is taken from about this many ids.
_SAMPLE = 512


@dataclass(frozen=True)
class DecoderLimits:
    """How ids are worked on. No limit changes the bytes, where `decode` gives any."""

    # Ids worked on at a time, so that the arrays fit the processor's cache; twice as many of short tokens.
    block: int = 1 << 14
    # The tables have room for ids below this.
    max_ids: int = 1 << 20
    # Writing a word takes longer than joining two. So tokens with fewer bytes on average than this are joined in eights, or
    # in fours, and written as two words at once. Tamil has 1.0, Thai 1.5, Hindi 1.7, Japanese 2.2, and English 4.2.
    bytes_for_eights: float = 1.6
    bytes_for_fours: float = 2.7


_DEFAULT_LIMITS = DecoderLimits()


class ArrayDecoder:
    """The bytes of all tokens in one row, and where each begins."""

    def __init__(self, token_bytes: Mapping[int, bytes], limits: DecoderLimits = _DEFAULT_LIMITS) -> None:
        self._limits = limits
        tokens = list(map(token_bytes.get, range(min(limits.max_ids, 1 + max(token_bytes)))))
        self._is_missing = np.array([token is None for token in tokens])
        self._has_gaps = bool(self._is_missing.any())
        data = [token or b"" for token in [*tokens, b""]]  # the last is no token, but fills a group
        lengths = np.array(list(map(len, data)), np.int64)
        self._bits = (8 * lengths).astype(np.uint64)
        self._begins = np.cumsum(lengths) - lengths
        self._bytes = _places(bytearray(b"".join(data) + bytes(_WORD)), _WORD)
        # The first bytes of each token, and zeros.
        keep = np.array([(1 << 8 * length) - 1 for length in range(_WORD + 1)], np.uint64)
        self._words = self._bytes[self._begins].view("<u8").astype(np.uint64) & keep.take(np.minimum(lengths, _WORD))

    @property
    def n_ids(self) -> int:
        """Ids below this have a place in the tables."""
        return len(self._words) - 1

    @collector_paused()  # the blocks' views would wake it, and it would look through all ids
    def decode(self, ids: list[int]) -> bytes | None:
        """The bytes of `ids`; None if one of them is no int, is not in the vocabulary, or is very large."""
        try:
            numbers = from_list(ids)
        except (OverflowError, TypeError):
            return None
        if numbers.max(initial=0) >= self.n_ids or (self._has_gaps and self._is_missing[numbers].any()):
            return None
        sample = self._bits[numbers[:: len(ids) // _SAMPLE + 1]]
        n_bytes = sample.sum() / (8 * max(1, len(sample)))
        limits = self._limits
        n_joins = 3 if n_bytes < limits.bytes_for_eights else 2 if n_bytes < limits.bytes_for_fours else 0
        size = limits.block << (n_joins > 0)
        blocks = (numbers[at : at + size] for at in range(0, len(ids), size))
        return b"".join([self.joined(block, n_joins) if n_joins else self.one_by_one(block) for block in blocks])

    def one_by_one(self, ids: npt.NDArray[np.uint32]) -> memoryview:
        """The bytes of `ids`, all of which have an entry in the tables, each written on its own."""
        index = ids.astype(np.int64)
        lengths = self._bits.take(index, mode="clip").view(np.int64) >> 3  # "clip" only for speed
        ends = np.cumsum(lengths)
        data = bytearray(int(ends[-1]) + _WORD)
        self._write(data, ends - lengths, index, lengths)
        return memoryview(data)[:-_WORD]

    def _write(
        self, data: bytearray, targets: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> None:
        """Write tokens of such lengths to their places in `data`, which ascend, and up to a word of anything behind each."""
        at_byte = _places(data, _WORD)
        longer = (lengths > _WORD).nonzero()[0]
        if len(longer):
            targets_of_longer, n_bytes, begins = targets[longer], lengths[longer], self._begins[ids[longer]]
            # What is behind comes first: what is too much of it is then written over, too.
            for behind in range(_WORD, int(n_bytes.max()), _WORD):
                more = n_bytes > behind
                at_byte[targets_of_longer[more] + behind] = self._bytes[begins[more] + behind]
        words = self._words.take(ids, mode="clip")
        at_byte[targets] = words.astype("<u8", copy=False).view(at_byte.dtype)  # NumPy puts them down in this order

    def joined(self, ids: npt.NDArray[np.uint32], n_joins: int) -> memoryview:
        """The bytes of `ids`, written in groups: words are joined in twos `n_joins` times, at last to two side by side."""
        n = 1 << n_joins
        if len(ids) % n:
            ids = np.append(ids, np.full(-len(ids) % n, self.n_ids, np.uint32))
        index = ids.reshape(-1, n).T.astype(np.int64, order="C")  # a column a group, for NumPy is fastest along rows
        words, bits = self._words.take(index, mode="clip"), self._bits.take(index, mode="clip")
        for _ in range(n_joins - 1):
            seconds = words[1::2]  # in place, where it lies in the cache
            seconds <<= bits[::2]  # 0 where there is no room
            seconds |= words[::2]
            bits[::2] += bits[1::2]
            words, bits = seconds, bits[::2]
        pairs = np.empty((len(ids) // n, 2), np.uint64)
        np.bitwise_or(words[0], words[1] << bits[0], out=pairs[:, 0])
        np.right_shift(words[1], 8 * _WORD - bits[0], out=pairs[:, 1])
        lengths = (bits[0] + bits[1]).view(np.int64) >> 3
        ends = np.cumsum(lengths)
        targets = ends - lengths
        data = bytearray(int(ends[-1]) + 2 * _WORD)
        at_byte = _places(data, 2 * _WORD)
        written = pairs.astype("<u8", copy=False).view(at_byte.dtype)[:, 0]
        # Words that did not hold all: the group is written token by token, and its beginning taken from there.
        longer = (np.maximum(bits[0], bits[1]) > 8 * _WORD).nonzero()[0]
        if len(longer):
            their_ids = index[:, longer].T
            their_lengths = self._bits[their_ids].view(np.int64) >> 3
            their_targets = targets[longer, None] + np.cumsum(their_lengths, 1) - their_lengths
            self._write(data, their_targets.ravel(), their_ids.ravel(), their_lengths.ravel())
            written[longer] = at_byte[targets[longer]]
        at_byte[targets] = written
        return memoryview(data)[: -2 * _WORD]


def _places(data: bytearray, width: int) -> npt.NDArray[np.void]:
    """For each place in `data` but the last ones, the `width` bytes that begin there."""
    return np.ndarray((len(data) - width + 1,), f"V{width}", buffer=data, strides=(1,))
