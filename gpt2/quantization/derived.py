"""Derived: what is made of a module's weights once, and kept until the weights change. It knows neither side.

`state_of` is the notion of "the weights have changed"; it has two depths, because one of them reads all weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class Derived(Generic[Value]):
    """One value for each module, kept as long as the module lives and its weights are in the state they were in.

    It stands outside the modules, so copies of a model, pickles and state dicts do not contain it.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[nn.Module, tuple[object, Value]] = weakref.WeakKeyDictionary()

    def __contains__(self, module: nn.Module) -> bool:
        """Whether a value is kept, for whatever state."""
        return module in self._kept

    def state(self, module: nn.Module) -> object:
        """The state that the kept value was made in; None if there is no value."""
        kept = self._kept.get(module)
        return None if kept is None else kept[0]

    def of(self, module: nn.Module, state: object, make: Callable[[], Value]) -> Value:
        """The kept value if it was made in this `state`; otherwise what `make` returns, which is then kept."""
        kept = self._kept.get(module)
        if kept is None or kept[0] != state:
            kept = self._kept[module] = state, make()
        return kept[1]

    def forget(self, module: nn.Module) -> None:
        """Make the value again when it is next asked for."""
        self._kept.pop(module, None)


def state_of(*weights: Tensor | None) -> object:
    """Differs when weights are replaced, or written to by torch's operations. Reads no weights.

    Tensors made under inference mode have no version: what is written into them is not noticed.
    """
    return [(w.data_ptr(), None if w.is_inference() else w._version) for w in weights if w is not None]


def state_with_contents(weight: Tensor) -> object:
    """Differs also when a matrix is written to through `weight.data`, which has no version. Reads all of it.

    The bytes are added up as whole numbers, eight at a time. Only where values change places within a row is nothing seen.
    """
    matrix = weight.t() if weight.t().is_contiguous() else weight.contiguous()
    n_rows, n_bytes, offset = len(matrix), matrix.shape[1] * matrix.itemsize, matrix.storage_offset() * matrix.itemsize
    numbers = matrix.reshape(-1).view(torch.uint8 if n_bytes % 8 or offset % 8 else torch.int64)
    sums = numbers.view(n_rows, -1).sum(1, dtype=torch.int64)
    odd = torch.arange(1, 2 * len(sums), 2)  # so that no bit is multiplied out of the number
    return state_of(weight), (sums * odd).sum().item()
