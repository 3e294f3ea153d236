"""Kill a writer before each of its file operations: the writer runs in a forked process, which kills itself."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import torch

from gpt2.weights import writing

_CHANGES = {
    "os.mkdir",
    "os.rmdir",
    "os.rename",
    "os.remove",
    "os.chmod",
    "os.truncate",
    "os.link",
    "os.symlink",
    "fcntl.flock",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class _Count:
    """Counts operations, and kills the process before the one with the number `last`."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __call__(self, finish: Callable[[], object] | None = None) -> None:
        self.left -= 1
        if self.left < 0:
            if finish is not None:
                finish()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES):
            self()


def run_and_kill(write: Callable[[], object], n_operations: int) -> bool:
    """Run `write` in another process that is killed after `n_operations`. Returns whether it was killed.

    An operation makes, opens for writing, flushes, renames or removes a file or folder, or locks one. The writing of weights
    is two: nothing is written, half of the file is written. An error of `write` is an AssertionError.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.dump_traceback_later(60, exit=True)
            torch.set_num_threads(1)  # the parent's threads do not exist here
            count = _Count(n_operations)
            _count_calls(count)
            sys.addaudithook(count.audit)
            write()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the writer raised an error"
    return False


def _count_calls(count: _Count) -> None:
    """Count what the interpreter does not audit: fsync, and the files that safetensors writes."""
    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)

    os.fsync = counted_fsync
    for module in (writing, safetensors.numpy):
        module.save_file = _counted_save(module.save_file, count)


def _counted_save(save: Callable[..., None], count: _Count) -> Callable[..., None]:
    def counted(tensors: object, path: Path, **options: object) -> None:
        def half() -> None:
            save(tensors, path, **options)
            descriptor = os.open(path, os.O_RDWR)
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)

        count()
        count(lambda: setattr(count, "left", 1 << 30) or half())
        save(tensors, path, **options)

    return counted
