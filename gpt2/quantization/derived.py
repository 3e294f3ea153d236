"""Derived: values that are computed from a module's weights and kept until the weights change. It depends on torch only.

`state_of` and `state_with_contents` detect changes of weights. The second one detects more, but reads all weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class Derived(Generic[Value]):
    """One value for each module, kept while the module exists and the state of its weights is unchanged.

    The values are stored outside the modules, so copies of a model, pickles and state dicts do not contain them.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[nn.Module, tuple[object, Value]] = weakref.WeakKeyDictionary()

    def __contains__(self, module: nn.Module) -> bool:
        """Return whether a value is kept for this module, in any state."""
        return module in self._kept

    def state(self, module: nn.Module) -> object:
        """Return the state for which the kept value was made; None if there is no value."""
        kept = self._kept.get(module)
        return None if kept is None else kept[0]

    def of(self, module: nn.Module, state: object, make: Callable[[], Value]) -> Value:
        """Return the kept value if it was made for this `state`; otherwise call `make`, and keep and return its result."""
        kept = self._kept.get(module)
        if kept is None or kept[0] != state:
            kept = self._kept[module] = state, make()
        return kept[1]

    def forget(self, module: nn.Module) -> None:
        """Drop the value, so that the next call of `of` makes it again."""
        self._kept.pop(module, None)


def state_of(*weights: Tensor | None) -> object:
    """Return a value that changes when weights are replaced or modified by torch's operations. It does not read the weights.

    Tensors made in inference mode have no version, so changes of their contents are not detected.
    """
    return [(w.data_ptr(), None if w.is_inference() else w._version) for w in weights if w is not None]


def state_with_contents(weight: Tensor) -> object:
    """Return a value that also changes when a matrix is modified through `weight.data`, which does not change its version.

    It reads the whole matrix and adds its bytes as integers, eight bytes at a time. A permutation of values within a row is
    not detected.
    """
    matrix = weight.t() if weight.t().is_contiguous() else weight.contiguous()
    n_rows, n_bytes, offset = len(matrix), matrix.shape[1] * matrix.itemsize, matrix.storage_offset() * matrix.itemsize
    numbers = matrix.reshape(-1).view(torch.uint8 if n_bytes % 8 or offset % 8 else torch.int64)
    sums = numbers.view(n_rows, -1).sum(1, dtype=torch.int64)
    odd = torch.arange(1, 2 * len(sums), 2)  # multiplication by an odd number loses no bit modulo 2**64
    return state_of(weight), (sums * odd).sum().item()
