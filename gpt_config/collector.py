"""Pause Python's garbage collector while hundreds of thousands of long-lived objects are created. Standard library only."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused(made_is_old: bool = False) -> Iterator[None]:
    """A context manager and decorator in which no garbage is collected. The collector's previous state is restored.

    The collector scans all objects each time their number has grown by 25%. Where all new objects stay alive it finds
    nothing: with torch imported, reading GPT-2's vocabulary takes half as long without it. The pause applies to the whole
    process.

    With `made_is_old`, all objects that exist at the end join the oldest generation, which only a full collection scans.
    Otherwise the next collection of young objects scans them, which takes 0.15 s for 25 million ids in lists.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if made_is_old and not gc.get_freeze_count():  # otherwise unfreeze() would release the program's frozen objects
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            gc.enable()
