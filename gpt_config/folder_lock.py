"""Locks on folders and files, which a process loses when it ends, however it ends. Standard library only."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Why a file system refuses a lock, other than that somebody else has it: it has no locks, or none on folders.
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EBADF, errno.EINVAL}


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock on an existing folder or file. BlockingIOError, at once, if another process or thread holds it.

    It yields False, without a lock, where the file system has no locks. On a network drive the lock may hold on this machine
    only. The lock is on the folder or file itself and leaves no other. On Windows it is a file `PATH.lock`, which Windows
    removes.
    """
    descriptor = _lock(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


if sys.platform == "win32":  # pragma: no cover - the tests run on Linux

    def _lock(folder: Path) -> int | None:
        try:
            return os.open(f"{folder}.lock", os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_TEMPORARY | os.O_NOINHERIT)
        except (FileExistsError, PermissionError) as error:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(folder)) from error

else:
    import fcntl

    def _lock(folder: Path) -> int | None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return None
            raise
        return descriptor
