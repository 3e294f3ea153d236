"""Functions of tensors, run by TorchScript's interpreter instead of Python's. It knows nothing of what they compute.

Between two products of a decode step Python runs, from memory that the weights have just swept its caches of. TorchScript's
interpreter calls the same operations in the same order, hence the same bits, in two thirds of that time. Of its compiler
nothing else is used: it would fuse operations, which takes longer than a short text and changes bits.

torch means to drop TorchScript some day. Where it is missing, or does not take a function, Python runs the function.
"""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

_compiling = threading.Lock()


class Scripted:
    """`function`, which keeps to the part of Python that TorchScript knows. It is read at the first call, in about 20 ms."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._script: Any = None  # or False, if there is none
        self._file_state = _file_state(function)

    def __call__(self, *args: Any) -> Any:
        script = self.script()
        if script is None:
            return self.function(*args)
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # of this thread alone
            return script(*args)

    def script(self) -> Callable[..., Any] | None:
        """What TorchScript runs, or None where Python runs the function: while torch.compile looks on, for example."""
        if torch.compiler.is_compiling():
            return None
        if self._script is None:
            with _compiling:
                if self._script is None:
                    self._script = self._compile() or False
        return self._script or None

    def _compile(self) -> Any:
        # TorchScript reads the source, which must still be the one that Python has imported.
        if self._file_state is None or self._file_state != _file_state(self.function):
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is to be dropped
                script = torch.jit.script(self.function)
        except Exception:  # whatever another version of torch stumbles over, Python does the same
            return None
        return script if isinstance(script, torch.jit.ScriptFunction) else None  # PYTORCH_JIT=0 gives the function back

    def list_of(self, values: list[Any]) -> list[Any]:
        """`values`, not empty and all of one type, as an argument for many calls: a list is converted for each of them."""
        script_list = getattr(torch._C, "ScriptList", None)  # private, for torch.jit.script warns at each list
        return script_list(values) if script_list is not None and self.script() is not None else values


def _file_state(function: Callable[..., Any]) -> tuple[int, int] | None:
    try:
        state = os.stat(inspect.getsourcefile(function) or "")
    except (OSError, TypeError):
        return None
    return state.st_mtime_ns, state.st_size
