"""A disk that is full, for this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """A limit on the size of files: the kernel refuses to write more, as a full disk does."""
    resource = pytest.importorskip("resource", reason="this system sets no limits on files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
