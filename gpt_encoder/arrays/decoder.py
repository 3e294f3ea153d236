"""ArrayDecoder: the bytes of many ids at once. It knows the bytes of each id and nothing of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpt_config.collector import collector_paused
from gpt_encoder.arrays import from_list

# Bytes per word. Each token or group of tokens is written as one or two whole words, which are longer than most tokens. The
# next token overwrites the excess bytes.
_WORD = 8
# The average length of tokens is estimated from about this many ids.
_SAMPLE = 512


@dataclass(frozen=True)
class DecoderLimits:
    """How ids are decoded. No limit changes the bytes; `decode` returns None for ids of `max_ids` or more."""

    # Ids decoded at a time, so that the arrays fit the processor's cache; twice as many if the tokens are short.
    block: int = 1 << 14
    # The tables contain ids below this.
    max_ids: int = 1 << 20
    # Average bytes per token below which eight tokens are joined and written as two words at once, because writing a word
    # takes longer than joining two. Tamil has 1.0 bytes per token, Thai 1.5, Hindi 1.7, Japanese 2.2, English 4.2.
    bytes_for_eights: float = 1.6
    # The same for groups of four tokens.
    bytes_for_fours: float = 2.7


_DEFAULT_LIMITS = DecoderLimits()


class ArrayDecoder:
    """Decodes ids with tables: the bytes of all tokens, concatenated, and the start of each token."""

    def __init__(self, token_bytes: Mapping[int, bytes], limits: DecoderLimits = _DEFAULT_LIMITS) -> None:
        self._limits = limits
        tokens = list(map(token_bytes.get, range(min(limits.max_ids, 1 + max(token_bytes)))))
        self._is_missing = np.array([token is None for token in tokens])
        self._has_gaps = bool(self._is_missing.any())
        data = [token or b"" for token in [*tokens, b""]]  # the last is not a token; it fills an incomplete group
        lengths = np.array(list(map(len, data)), np.int64)
        self._bits = (8 * lengths).astype(np.uint64)
        self._begins = np.cumsum(lengths) - lengths
        self._bytes = _places(bytearray(b"".join(data) + bytes(_WORD)), _WORD)
        # The first 8 bytes of each token, padded with zeros.
        keep = np.array([(1 << 8 * length) - 1 for length in range(_WORD + 1)], np.uint64)
        self._words = self._bytes[self._begins].view("<u8").astype(np.uint64) & keep.take(np.minimum(lengths, _WORD))

    @property
    def n_ids(self) -> int:
        """The tables contain all ids below this."""
        return len(self._words) - 1

    @collector_paused()  # otherwise the views of the blocks start collections, which scan all ids
    def decode(self, ids: list[int]) -> bytes | None:
        """The bytes of `ids`, concatenated. None if one is not an int, not in the vocabulary, or not below `n_ids`."""
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
        """The bytes of `ids`, written token by token. All ids must be in the tables."""
        index = ids.astype(np.int64)
        lengths = self._bits.take(index, mode="clip").view(np.int64) >> 3  # "clip" only for speed
        ends = np.cumsum(lengths)
        data = bytearray(int(ends[-1]) + _WORD)
        self._write(data, ends - lengths, index, lengths)
        return memoryview(data)[:-_WORD]

    def _write(
        self, data: bytearray, targets: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> None:
        """Write tokens of the given lengths to `data` at `targets`, which must ascend.

        Up to one word after each token is overwritten with arbitrary bytes.
        """
        at_byte = _places(data, _WORD)
        longer = (lengths > _WORD).nonzero()[0]
        if len(longer):
            targets_of_longer, n_bytes, begins = targets[longer], lengths[longer], self._begins[ids[longer]]
            # The bytes after the first word come first, so that the first words of the next tokens overwrite their excess.
            for offset in range(_WORD, int(n_bytes.max()), _WORD):
                more = n_bytes > offset
                at_byte[targets_of_longer[more] + offset] = self._bytes[begins[more] + offset]
        words = self._words.take(ids, mode="clip")
        at_byte[targets] = words.astype("<u8", copy=False).view(at_byte.dtype)  # NumPy writes them in the order of `targets`

    def joined(self, ids: npt.NDArray[np.uint32], n_joins: int) -> memoryview:
        """The bytes of `ids`, written in groups of 2**`n_joins` tokens. All ids must be in the tables.

        Neighbours are joined `n_joins` times. The last join makes two words, which are written together.
        """
        n = 1 << n_joins
        if len(ids) % n:
            ids = np.append(ids, np.full(-len(ids) % n, self.n_ids, np.uint32))
        index = ids.reshape(-1, n).T.astype(np.int64, order="C")  # one group per column: NumPy is fastest along rows
        words, bits = self._words.take(index, mode="clip"), self._bits.take(index, mode="clip")
        for _ in range(n_joins - 1):
            seconds = words[1::2]  # changed in place, while it is in the processor's cache
            seconds <<= bits[::2]  # 0 for shifts of 64 or more
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
        # Groups with a half longer than a word are written token by token. Their first bytes are then read back, because
        # the first two words of every group are written below.
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
    """A view of `data` with the `width` bytes that start at each index, up to the last index with `width` bytes."""
    return np.ndarray((len(data) - width + 1,), f"V{width}", buffer=data, strides=(1,))
