"""Atomic file writes: a file in a temporary folder beside it is flushed to disk, then renamed to the target.

Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gpt_config.errors import WriteError
from gpt_config.folder_lock import locked
from gpt_config.json_text import to_json

_TEMPORARY = re.compile(r"\.gpt2-[0-9a-f]{16}\.tmp")


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Call `write` with the path of a temporary file, then rename that file to `path`.

    If the write is interrupted (an exception, a full disk, a killed process), `path` contains either its old bytes or all
    of the new ones. The next write in the same folder removes what a killed process left. Raises WriteError, with the
    reason, if the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path.parent) as folder:
            temporary = folder / path.name
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = temporary.stat().st_mode
            write(temporary)
            os.chmod(temporary, mode)  # a library may have replaced the file by one that only its owner can read
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except WriteError:
        raise
    except OSError as error:
        raise write_error(path, error) from None
    except ValueError as error:
        if "\0" in str(path):  # any other ValueError is of `write`
            raise write_error(path, error) from None
        raise


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new empty folder in `parent`, which is removed at the end, unless it was renamed. Raises OSError.

    It is locked while it is used. Folders of this kind that no living process has locked are removed first.
    """
    remove_abandoned(parent)
    with ExitStack() as locks:
        folder = _new_locked(parent, locks)
        try:
            yield folder
        finally:
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)


def is_temporary(folder: Path) -> bool:
    """Whether `temporary_folder` makes folders of this name."""
    return _TEMPORARY.fullmatch(folder.name) is not None


def _new_locked(parent: Path, locks: ExitStack) -> Path:
    while True:
        folder = parent / f".gpt2-{secrets.token_hex(8)}.tmp"
        folder.mkdir()
        # Before it is locked, another process may find it abandoned and remove it.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            locks.enter_context(locked(folder))
            if folder.exists():
                return folder


def remove_abandoned(parent: Path) -> None:
    """Remove the temporary folders in `parent` whose process has ended. Those of living processes stay."""
    with contextlib.suppress(OSError):
        for name in filter(_TEMPORARY.fullmatch, os.listdir(parent)):
            with contextlib.suppress(OSError), locked(parent / name) as is_locked:
                if is_locked:
                    shutil.rmtree(parent / name, ignore_errors=True)


def write_error(path: Path, error: OSError | ValueError) -> WriteError:
    """The WriteError for a path that could not be written because of `error`."""
    reason = getattr(error, "strerror", None) or error
    return WriteError(f"cannot write {path} ({reason}): choose another path or free disk space; no file was changed")


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` atomically as UTF-8, with "\\n" line ends."""
    atomic_write(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def atomic_write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Write `value` atomically as JSON, in which NaN and infinity are null."""
    atomic_write_text(path, to_json(value, indent=indent, ensure_ascii=False) + "\n")
