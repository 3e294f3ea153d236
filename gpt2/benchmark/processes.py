"""Separate processes: a Python program with a number of threads, and an object whose methods are called from here.

Engines in one process slow each other down. Several of them include OpenMP, whose threads stop waiting actively once all of
them together outnumber the cores. A tokenizer that leaves a fragmented heap makes the allocations of the next one slow:
encoding with NumPy took 1.4 times as long after one that had left many small pieces. It knows no engine and no tokenizer.
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

_SECONDS_TO_END = 5  # before a process is killed


def run_python(arguments: list[str], threads: int) -> str:
    """The standard output of `python ARGUMENTS`, in which this package can be imported.

    LeftOutError with the last line of its standard error if it fails.
    """
    root = str(Path(gpt2.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, encoding="utf-8")
    if result.returncode < 0:
        raise LeftOutError(_how_it_ended(result.returncode))
    if result.returncode:
        raise LeftOutError(f"failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return result.stdout


class Apart:
    """The object that `make(*arguments)` returns, in a separate process. LeftOutError if making it or a method fails."""

    def __init__(self, make: Callable[..., object], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit locks held by our threads
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
        """The result of the object's method of that name. LeftOutError if it fails or the process has ended."""
        with contextlib.suppress(BrokenPipeError):  # the process has ended, which `_answer` reports
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
            self._process.join(_SECONDS_TO_END)
            raise LeftOutError(_how_it_ended(self._process.exitcode)) from None
        if error is not None:
            raise LeftOutError(error)
        return value


def _serve(connection: Connection, make: Callable[..., object], arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the benchmark, which closes the pipe and so ends this process
    with contextlib.suppress(EOFError, ConnectionError):  # the other end is closed
        try:
            made = make(*arguments)
        except Exception as error:  # an error in another library must not stop the benchmark
            connection.send((None, _in_a_line(error)))
            return
        connection.send((None, None))
        while True:
            method, arguments = connection.recv()
            try:
                answer: tuple[Any, str | None] = getattr(made, method)(*arguments), None
            except Exception as error:  # the same reason as above
                answer = None, _in_a_line(error)
            connection.send(answer)


def _how_it_ended(code: int | None) -> str:
    """How a process ended that has reported no error. `code` is as in `Popen.returncode`."""
    if code is None or code >= 0:
        return "its process does not answer" if code is None else f"its process ended with exit code {code}"
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    return f"its process was ended by {name}" + ", most likely because memory ran out" * (name == "SIGKILL")


def _in_a_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or "no message"
    return message if isinstance(error, LeftOutError) else f"{type(error).__name__}: {message}"
