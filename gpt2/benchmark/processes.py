"""Processes of their own: Python with this package importable and a number of threads, and objects to ask things of.

What shares a process slows each other. Several engines bring OpenMP along, which stops its threads from waiting actively as
soon as all of them together are more than the cores. And what a tokenizer leaves of the heap makes another's allocations
slow: encoding with NumPy took 1.4 times as long behind one that had left many small pieces.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gpt2
from gpt2.benchmark.results import LeftOutError

_SECONDS_TO_END = 5


def run_python(arguments: list[str], threads: int) -> str:
    """The standard output of `python ARGUMENTS`. LeftOutError with the last line of its errors if it fails."""
    root = str(Path(gpt2.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, encoding="utf-8")
    if result.returncode < 0:
        raise LeftOutError(f"was ended by signal {-result.returncode}: most likely there was not enough memory")
    if result.returncode:
        raise LeftOutError(f"failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return result.stdout


class Apart:
    """What `make(*arguments)` makes, in a process of its own. LeftOutError if that fails, or an answer does."""

    def __init__(self, make: Callable[..., object], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit our threads' locks
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except LeftOutError:
            self.close()
            raise

    def ask(self, method: str, *arguments: object) -> Any:
        """What the method of that name returns there."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._connection.send((method, arguments))
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(_SECONDS_TO_END)
        self._process.kill()

    def _answer(self) -> Any:
        try:
            value, error = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise LeftOutError("its process ended: most likely there was not enough memory") from None
        if error is not None:
            raise LeftOutError(error)
        return value


def _serve(connection: Connection, make: Callable[..., object], arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the benchmark, and its end of the pipe this process
    with contextlib.suppress(EOFError, ConnectionError):  # the other end is closed
        try:
            made = make(*arguments)
        except Exception as error:  # whatever goes wrong in a library of others, the rest is measured
            connection.send((None, _in_a_line(error)))
            return
        connection.send((None, None))
        while True:
            method, arguments = connection.recv()
            try:
                answer: tuple[Any, str | None] = getattr(made, method)(*arguments), None
            except Exception as error:  # as above
                answer = None, _in_a_line(error)
            connection.send(answer)


def _in_a_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or "no message"
    return message if isinstance(error, LeftOutError) else f"{type(error).__name__}: {message}"
