"""Processes that keep cores busy while engines are measured, as a browser or another user does. They compute nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# It ends with the process that started it, however that ends.
_LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Inside `with`, `count` processes run an endless loop. Each has a separate session, as other programs have, because
    Linux divides the cores among sessions first."""
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", _LOOP], start_new_session=True)
            stack.callback(process.wait)
            stack.callback(process.kill)  # runs first
        yield
