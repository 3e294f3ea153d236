"""Open and parse files that may be damaged or hostile: regular files only, and JSON of limited depth.

It needs the standard library only, and knows nothing of what the files contain.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

# Levels of lists and objects in a JSON file. The deepest file that this package reads, tokenizer.json, has fewer than ten.
_MAX_DEPTH = 100


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading. OSError for a folder, a pipe, a socket or a device, without waiting for its other end."""
    check_regular(path)
    # The second check, of what was opened, is for a path that changed between the two.
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    try:
        _check_mode(os.fstat(file.fileno()).st_mode, path)
    except BaseException:
        file.close()
        raise
    return file


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError unless `path` is a regular file or a link to one."""
    try:
        _check_mode(os.stat(path).st_mode, path)
    except ValueError:  # a null byte in the name
        raise OSError(errno.EINVAL, "the name of a file cannot contain a null byte", str(path)) from None


def _check_mode(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a regular file", str(path))


def special_file(folder: Path, names: Iterable[str]) -> str:
    """Return the first of `names` that is in `folder` but not a regular file, such as a pipe, or "" if there is none.

    A search with `is_file` skips such a file silently, so another file would be read in its place.
    """
    for name in names:
        path = folder / name
        if path.exists() and not path.is_file():
            return name
    return ""


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """Return the text of a regular file, with "\\n" at all line ends. OSError, or UnicodeDecodeError (a ValueError)."""
    with io.TextIOWrapper(open_regular(path), encoding=encoding) as file:
        return file.read()


def read_json(path: str | os.PathLike[str], encoding: str = "utf-8") -> Any:
    """Return the value in a JSON file. OSError if it cannot be read; ValueError if it is not JSON or too deep."""
    return parse_json(read_text(path, encoding))


def parse_json(text: str, **options: Any) -> Any:
    """Return the value of `text`, with the options of `json.loads`. ValueError if it is not JSON or has over 100 levels.

    Python's limit depends on the caller's depth, and reaches other code, such as `repr` of the value.
    """
    too_deep = f"it has more than {_MAX_DEPTH} levels of lists and objects"
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise ValueError(too_deep) from None
    if text.count("[") + text.count("{") > _MAX_DEPTH and _is_deep(value):
        raise ValueError(too_deep)
    return value


def _is_deep(value: Any) -> bool:
    level: list[Any] = [[value]]
    for _ in range(_MAX_DEPTH + 1):
        children = chain.from_iterable(parent.values() if isinstance(parent, dict) else parent for parent in level)
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return False
    return True
