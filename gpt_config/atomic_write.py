"""Write a file whole or not at all: a new file beside the old one, flushed to the disk, then renamed over it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_config.errors import WriteError


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file in the folder of `path`, then rename it to `path`.

    Whatever interrupts it (an exception, a full disk, a lost process), `path` holds its old bytes or all of the new.
    WriteError says why it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise _write_error(path, error) from None
    mode = temporary.stat().st_mode
    try:
        write(temporary)
        os.chmod(temporary, mode)  # a library may have put a file of its own there, for its user's eyes only
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _write_error(path, error) from None
        raise


def _write_error(path: Path, error: OSError | ValueError) -> WriteError:
    reason = getattr(error, "strerror", None) or error
    return WriteError(f"cannot write {path} ({reason}): choose another place, or make room; the file is as it was")


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 with "\\n" line ends, whole or not at all."""
    atomic_write(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def atomic_write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as JSON, whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
