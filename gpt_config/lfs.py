"""Recognize Git LFS pointers, so that errors name them. Standard library only; it knows nothing of what files contain."""

from __future__ import annotations

import os

# Git stores a text of three lines in place of a large file, and a clone without git-lfs leaves it there. The specification
# (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md) gives the first key and the limit of the size.
_START = b"version https://git-lfs.github.com/spec/"
_MAX_BYTES = 1024


def pointer_message(path: str | os.PathLike[str]) -> str:
    """The message of an error about a file that is a Git LFS pointer, or "" if it is none.

    Without it, the error would advise to download the file again, which gives the same pointer.
    """
    try:
        if not os.path.isfile(path) or os.path.getsize(path) >= _MAX_BYTES:
            return ""
        with open(path, "rb") as file:
            is_pointer = file.read(len(_START)) == _START
    except OSError:
        return ""
    return f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder" if is_pointer else ""
