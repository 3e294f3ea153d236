"""Scripted: functions of tensors, run by TorchScript's interpreter instead of Python's. It depends on torch only.

Between two products of a decode step, Python runs slowly, because the weights have just replaced its data in the processor's
cache. TorchScript's interpreter calls the same operations in the same order, with the same bits, in 2/3 of that time. Its
optimizing compiler is not used: fusing operations takes longer than generating a short text, and changes results.

torch has deprecated TorchScript. If it is missing or cannot compile a function, Python runs the function.
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
    """Runs `function`, which must be in TorchScript's subset of Python. The first call compiles it, in about 20 ms."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._script: Any = None  # None: not compiled yet; False: cannot be compiled
        self._file_state = _file_state(function)

    def __call__(self, *args: Any) -> Any:
        script = self.script()
        if script is None:
            return self.function(*args)
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # for this thread only
            return script(*args)

    def script(self) -> Callable[..., Any] | None:
        """Return the compiled function, or None if Python runs it, for example while torch.compile traces it."""
        if torch.compiler.is_compiling():
            return None
        if self._script is None:
            with _compiling:
                if self._script is None:
                    self._script = self._compile() or False
        return self._script or None

    def _compile(self) -> Any:
        # TorchScript reads the source file, which must not have changed since Python imported it.
        if self._file_state is None or self._file_state != _file_state(self.function):
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the deprecation warning
                script = torch.jit.script(self.function)
        except Exception:  # if another version of torch cannot compile it, Python computes the same
            return None
        return script if isinstance(script, torch.jit.ScriptFunction) else None  # PYTORCH_JIT=0 returns the function itself

    def list_of(self, values: list[Any]) -> list[Any]:
        """Return `values`, a non-empty list of one type, in TorchScript's form; otherwise every call would convert it."""
        script_list = getattr(torch._C, "ScriptList", None)  # private, because torch.jit.script warns at each list
        return script_list(values) if script_list is not None and self.script() is not None else values


def _file_state(function: Callable[..., Any]) -> tuple[int, int] | None:
    try:
        state = os.stat(inspect.getsourcefile(function) or "")
    except (OSError, TypeError):
        return None
    return state.st_mtime_ns, state.st_size
