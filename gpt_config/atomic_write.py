"""Atomic file writes: a temporary file in the same folder is flushed to disk, then renamed to the target.

Standard library only.
"""

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
    """Call `write` with the path of a temporary file in the folder of `path`, then rename that file to `path`.

    If the write is interrupted (an exception, a full disk, a killed process), `path` contains either its old bytes or all
    of the new ones. Raises WriteError, with the reason, if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except (OSError, ValueError) as error:  # ValueError: an invalid path, such as one with a null byte
        raise _write_error(path, error) from None
    mode = temporary.stat().st_mode
    try:
        write(temporary)
        os.chmod(temporary, mode)  # a library may have replaced the file by one that only its owner can read
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
    return WriteError(f"cannot write {path} ({reason}): choose another path or free disk space; no file was changed")


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` atomically as UTF-8, with "\\n" line ends."""
    atomic_write(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def atomic_write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Write `value` atomically as JSON."""
    atomic_write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
