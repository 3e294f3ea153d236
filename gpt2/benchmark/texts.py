"""Texts that every machine has: English and Python code from the standard library, or a file of the user's."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from gpt_config.errors import DataError, InputError

# Characters of each: so many that what a tokenizer prepares and learns at first counts as little as in use.
_LIMIT = 10_000_000
# Folders of the standard library that hold other packages, or tests, which are full of odd data.
_NOT_ITS_OWN = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}


@dataclass(frozen=True)
class Texts:
    """Texts by name. The first of them is what prompts are cut from."""

    by_name: dict[str, str]
    source: str

    @property
    def prompts(self) -> str:
        return next(iter(self.by_name.values()))

    def described(self) -> str:
        """What the texts are, in a line."""
        sizes = ", ".join(f"{name} {len(text.encode()) / 1e6:.2g} MB" for name, text in self.by_name.items())
        return f"{sizes}: {self.source}"


def texts_of(file: str | None) -> Texts:
    """The user's file, or prose (documentation) and code of Python's standard library. DataError or InputError if the file
    cannot be used."""
    if file is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        paths = sorted(path for path in library.rglob("*.py") if not _NOT_ITS_OWN & set(path.relative_to(library).parts))
        sources = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
        source = f"documentation and code of the standard library of Python, at most {_LIMIT:,} characters each"
        return Texts({"prose": _documentation(sources), "code": "".join(sources)[:_LIMIT]}, source)
    try:
        text = Path(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}): convert it") from None
    if not text.strip():
        raise DataError(f"{file} is empty: give a text of some sentences")
    return Texts({Path(file).name: text}, "given as a file")


def _documentation(sources: list[str]) -> str:
    """What stands between triple quotes, which is English mostly: a line each without its indent; at most `_LIMIT`."""
    parts = [part for source in sources for part in source.split('"""')[1::2]]
    lines = [stripped for part in parts for line in part.split("\n") if (stripped := line.strip())]
    return "\n".join(lines)[:_LIMIT]
