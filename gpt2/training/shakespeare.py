"""The text tinyshakespeare by name: downloaded once, checked, and cached. Depends on the standard library only."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from gpt_config.atomic_write import atomic_write
from gpt_config.errors import DataError

NAME = "shakespeare"
_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TIMEOUT_SECONDS = 20.0


def resolve(path: str, *, sha256: str = SHA256) -> str:
    """Return `path`, or the path of the cached tinyshakespeare if `path` is "shakespeare": see `fetch_shakespeare`.

    The name means the text even if there is a folder of that name, because folders of runs often have it. "./shakespeare" is
    the folder.
    """
    return str(fetch_shakespeare(sha256=sha256)) if path == NAME else path


def fetch_shakespeare(*, sha256: str = SHA256) -> Path:
    """Return the path of the cached file. It is downloaded if it is missing or damaged.

    DataError if the download fails, or if the hash of the downloaded file is not `sha256`.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-from-scratch" / "tinyshakespeare.txt"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    import urllib.request

    try:
        with urllib.request.urlopen(_URL, timeout=_TIMEOUT_SECONDS) as answer:
            content = answer.read()
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"tinyshakespeare cannot be downloaded from {_URL} ({reason}): connect to the network, "
            "or give the path of a text file"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{_URL} has changed (its SHA-256 is not {sha256[:8]}…): give the path of a text file")
    atomic_write(path, lambda temporary: temporary.write_bytes(content))
    return path
