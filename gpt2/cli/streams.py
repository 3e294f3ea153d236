"""Standard output and error that are closed, full, or in an encoding that lacks characters. Standard library only.

Messages never cost the text: an error of standard error is ignored. Text that is redirected is never changed: where the
encoding lacks characters it is UTF-8.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast


class _Wrapped:
    """A text stream that calls `write` in place of its own; in all else it is the stream."""

    def __init__(self, stream: TextIO, write: Callable[[TextIO, str], int]) -> None:
        self._stream, self._write = stream, write

    def write(self, text: str) -> int:
        return self._write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Messages(_Wrapped):
    """Standard error. Once it cannot be written, what is written to it is lost."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream, _write_or_lose)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Within, `sys.stdout` and `sys.stderr` are streams that a command can write to whatever they are."""
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    if sys.stderr is None:  # it was closed when Python started
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it is open until the process ends
    _set(sys.stderr, errors="replace" if sys.stderr.isatty() else "backslashreplace")
    sys.stderr = cast(TextIO, _Messages(sys.stderr))
    if sys.stdout is not None:
        # A terminal shows a stand-in for a character that it cannot show.
        if sys.stdout.isatty() or _has_all_characters(sys.stdout.encoding):
            _set(sys.stdout, errors="replace")
        else:
            encoding = sys.stdout.encoding
            _set(sys.stdout, encoding="utf-8", errors="replace")
            sys.stdout = cast(TextIO, _Wrapped(sys.stdout, _Warning(encoding)))
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _Warning:
    """Writes text, and warns once that it is not in the encoding that was asked for. ASCII is the same in both."""

    def __init__(self, encoding: str) -> None:
        self._encoding, self._has_warned = encoding, False

    def __call__(self, stream: TextIO, text: str) -> int:
        if not text.isascii() and not self._has_warned:
            self._has_warned = True
            message = (
                f"warning: the output is UTF-8, because {self._encoding} lacks characters (set PYTHONUTF8=1 for no warning)"
            )
            print(message, file=sys.stderr)
        return stream.write(text)


def _write_or_lose(stream: TextIO, text: str) -> int:
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # so that what Python still holds can be flushed at exit
            _to_nowhere(stream.fileno())
    return len(text)


def close_stdout() -> int:
    """Send what is still to be written to stdout nowhere, because Python's flush at exit would print an error.

    Returns 1, click's exit status for a closed pipe.
    """
    with contextlib.suppress(OSError, ValueError):
        _to_nowhere(sys.stdout.fileno())
    return 1


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _open_closed_descriptors() -> None:
    """Open the standard descriptors that are closed: the next file would get the number, and messages would land in it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number


def _has_all_characters(encoding: str | None) -> bool:
    try:
        return bool("\u0151\U0001f999".encode(encoding or "ascii"))
    except (UnicodeEncodeError, LookupError):
        return False


def _set(stream: TextIO, **settings: str) -> None:
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(**settings)
