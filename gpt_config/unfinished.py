"""Whether a model folder is whole: a writer that is replacing its files, or was killed then, left a mark. Reads only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt_config.errors import CheckpointError

# Folders with all files of the new version, inside the model folder. While the first exists, old files are removed; while
# the second exists, the new files are moved to their places. `gpt_config.whole_folder` makes them.
REMOVING, MOVING = ".gpt2-removing", ".gpt2-moving"

# Readers of folders start with these, so writers remove them first and write them last.
READ_FIRST = ("config.json", "adapter_config.json", "tokenizer_config.json")


def is_unfinished(folder: str | os.PathLike[str]) -> bool:
    """Whether the files of a folder are being replaced, or a program that replaced them was killed."""
    return any(os.path.isdir(Path(folder) / name) for name in (REMOVING, MOVING))  # False if the name is too long


def check_finished(folder: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if `is_unfinished`: such a folder has only some of its files."""
    if is_unfinished(folder):
        raise CheckpointError(
            f"{folder} is not whole: the program that writes it is still running or was killed; wait for it, or run it again"
        ) from None


@contextmanager
def unchanged(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Raise CheckpointError if a writer replaces files of `folder` during the block, which reads several of them.

    It replaces an error of the block, which may be caused by a file that was missing for a moment.
    """
    before = _versions(folder)
    try:
        yield
    except Exception:
        _check_unchanged(folder, before)
        raise
    _check_unchanged(folder, before)


def _check_unchanged(folder: str | os.PathLike[str], before: list[tuple[int, int] | None]) -> None:
    check_finished(folder)
    if _versions(folder) != before:
        raise CheckpointError(f"{folder} was written while it was read: load it again") from None


def _versions(folder: str | os.PathLike[str]) -> list[tuple[int, int] | None]:
    """What differs after a file of READ_FIRST was replaced. Both files exist for a while, so their inodes differ."""
    return [_version(Path(folder) / name) for name in READ_FIRST]


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # there is no such file
        return None
    return status.st_ino, status.st_mtime_ns
