"""`calls_of`: records the calls of a function without replacing it, for tests that a fast path is used at all."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class Call:
    arguments: dict[str, Any]
    returned: Any = None


@contextlib.contextmanager
def calls_of(function: Callable[..., Any]) -> Iterator[list[Call]]:
    """Yield a list of the calls of a Python function in this thread, in order, which grows until the block ends."""
    calls: list[Call] = []
    open_calls: dict[FrameType, Call] = {}

    def watch(frame: FrameType, event: str, value: Any) -> None:
        if frame.f_code is not function.__code__:
            return
        if event == "call":
            open_calls[frame] = Call(dict(frame.f_locals))
            calls.append(open_calls[frame])
        elif event == "return":
            open_calls.pop(frame).returned = value

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(before)
