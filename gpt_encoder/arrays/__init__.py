"""Encode and decode long texts in NumPy arrays, a block at a time. Needs NumPy; imported only for long texts.

The results are those of the modules without NumPy; tests compare them.
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
    """`ints` as an array (N,), faster than np.array. Raises OverflowError or TypeError unless all are 32-bit unsigned."""
    numbers = array("I")
    numbers.fromlist(ints)  # `array("I", ints)` takes 50% longer, because it counts a reference to each int
    return np.frombuffer(numbers, np.uint32)
