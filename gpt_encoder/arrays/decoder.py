"""ArrayDecoder: many ids to their bytes at once. It knows the bytes of each id, and nothing of text."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

# Bytes are copied so many at a time, more than most tokens have: what is too much comes to lie where the next token
# begins, and is written over by that.
_STRIDE = 8
# Ids worked on at a time, so that the arrays fit the processor's cache.
_BLOCK = 1 << 14
_MAX_IDS = 1 << 20


class ArrayDecoder:
    """The bytes of all tokens in one row, and where each begins."""

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._n_ids = min(_MAX_IDS, 1 + max(token_bytes))
        tokens = [token_bytes.get(token_id) for token_id in range(self._n_ids)]
        self._lengths = np.array([-1 if token is None else len(token) for token in tokens], np.int64)
        lengths = np.maximum(self._lengths, 0)
        self._begins = np.cumsum(lengths) - lengths
        self._bytes = _strides(bytearray(b"".join(filter(None, tokens)) + bytes(_STRIDE)))
        self._first_stride = self._bytes[self._begins]  # close together, for most tokens need no more

    def decode(self, ids: list[int]) -> bytes | None:
        """The bytes of `ids`; None if one of them is no int, is not in the vocabulary, or is very large."""
        try:
            numbers = np.frombuffer(array("I", ids), np.uint32)
            return b"".join(self._decode_block(numbers[at : at + _BLOCK]) for at in range(0, len(numbers), _BLOCK))
        except (IndexError, OverflowError, TypeError):
            return None

    def _decode_block(self, ids: npt.NDArray[np.uint32]) -> bytes:
        """The bytes of a block. IndexError if an id is not in the vocabulary."""
        places = ids.astype(np.int64)
        lengths = self._lengths.take(places)
        if lengths.min() < 0:
            raise IndexError("an id of no token")
        ends = np.cumsum(lengths)
        targets = ends - lengths
        data = bytearray(int(ends[-1]) + _STRIDE)
        at_byte = _strides(data)
        # What is behind a first stride comes first: what is too much of it is then written over by the next token too.
        longer = np.flatnonzero(lengths > _STRIDE)
        for behind in range(_STRIDE, int(lengths.max()), _STRIDE):
            longer = longer[lengths[longer] > behind]
            at_byte[targets[longer] + behind] = self._bytes[self._begins[places[longer]] + behind]
        at_byte[targets] = self._first_stride.take(places)  # NumPy puts them down in this order
        return bytes(memoryview(data)[:-_STRIDE])


def _strides(data: bytearray) -> npt.NDArray[np.void]:
    """For each place in `data` but the last ones, the _STRIDE bytes from there on."""
    return np.ndarray((len(data) - _STRIDE + 1,), f"V{_STRIDE}", buffer=data, strides=(1,))
