"""Functions of tensors, run by TorchScript's interpreter instead of Python's. It knows nothing of what they compute.

Between two products of a decode step Python runs, from memory that the weights have just swept its caches of. TorchScript's
interpreter calls the same operations in the same order, hence the same bits, in two thirds of that time. Of
its compiler nothing else is used: it would rewrite the operations, for a while that a short text does not last.

torch means to drop TorchScript some day. Where it is missing, or does not take a function, Python runs the function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


class Scripted:
    """`function`, which keeps to the part of Python that TorchScript knows. It is read at the first call, in about 10 ms."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._script: Any = None

    @property
    def is_compiled(self) -> bool:
        """Whether it is TorchScript that runs it."""
        if self._script is None:
            self._script = _compiled(self.function)
        return self._script is not self.function

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not self.is_compiled:
            return self.function(*args)
        with torch.jit.optimized_execution(False):  # of this thread alone
            return self._script(*args)

    def list_of(self, values: list[Any]) -> list[Any]:
        """`values` as an argument for many calls: an ordinary list is converted for each. TypeError if it is empty."""
        return _without_warning(torch.jit.script, values) if values and self.is_compiled else values


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return _without_warning(torch.jit.script, function)
    except Exception:  # whatever another version of torch stumbles over, Python does the same
        return function


def _without_warning(script: Callable[..., Any], what: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is to be dropped
        return script(what)
