"""An engine in a process of its own. Engines that share one slow each other, also those that do nothing: several bring
OpenMP along, which stops its threads from waiting actively as soon as all of them together are more than the cores.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpt2.benchmark.engines import Prompts, open_engine
from gpt2.benchmark.results import LeftOutError
from gpt2.benchmark.subject import Subject

_SECONDS_TO_END = 5


class EngineApart:
    """The engine of that name, as `engines.open_engine` opens it. LeftOutError if it cannot take part, or breaks."""

    def __init__(self, name: str, path: Path, subject: Subject, dtype: str, threads: int) -> None:
        self.name, self.dtype = name, dtype
        context = multiprocessing.get_context("spawn")  # a fork would inherit our threads' locks
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, path, subject, dtype, threads), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except LeftOutError:
            self.close()
            raise

    def generate(self, prompts: Prompts, n_new: int) -> list[list[int]]:
        """As `Engine.generate`."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._connection.send((prompts, n_new))
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


def _serve(connection: Connection, name: str, path: Path, subject: Subject, dtype: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the benchmark, and its end of the pipe this process
    try:
        engine = open_engine(name, path, subject, dtype, threads)
    except Exception as error:  # whatever goes wrong in a library of others, the rest is measured
        connection.send((None, _in_a_line(error)))
        return
    connection.send((None, None))
    while True:
        try:
            prompts, n_new = connection.recv()
        except EOFError:
            return
        try:
            connection.send((engine.generate(prompts, n_new), None))
        except Exception as error:  # as above
            connection.send((None, _in_a_line(error)))


def _in_a_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or "no message"
    return message if isinstance(error, LeftOutError) else f"{type(error).__name__}: {message}"
