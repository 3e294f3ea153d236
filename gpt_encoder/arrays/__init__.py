"""The tokenizer's work on long texts, a whole block at a time in NumPy arrays.

It gives the ids that the plain modules give, and is held against them; nothing here is imported before a text is long.
"""

from __future__ import annotations

from array import array
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Flags: TypeAlias = npt.NDArray[np.bool_]
Ids: TypeAlias = npt.NDArray[np.int32]
Numbers: TypeAlias = npt.NDArray[np.int64]
Points: TypeAlias = npt.NDArray[np.uint32]
Words: TypeAlias = npt.NDArray[np.uint64]


def from_list(ints: list[int]) -> npt.NDArray[np.uint32]:
    """`ints` in an array, sooner than NumPy does it. OverflowError or TypeError for what is no 32-bit unsigned int."""
    numbers = array("I")
    numbers.fromlist(ints)  # `array("I", ints)` would count a reference to each and take half as long again
    return np.frombuffer(numbers, np.uint32)
