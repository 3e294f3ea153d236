"""Run a command in this process: torch takes seconds to import and is already imported here."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from gpt2.cli import main


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    def run(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        handler = signal.getsignal(signal.SIGINT)
        try:
            with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
                main([str(arg) for arg in args])
        finally:
            signal.signal(signal.SIGINT, handler)
        captured = capsys.readouterr()
        return Result(ended.value.code, captured.out, captured.err)

    return run
