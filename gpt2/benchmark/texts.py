"""Texts for tokenizers and prompts: English and code from Python's standard library, or a file. It knows no tokenizer."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from gpt_config.errors import DataError, InputError

# Characters per text. A tokenizer prepares and caches data at first; in a long text, that counts as little as in normal use.
_LIMIT = 10_000_000
# Folders of the standard library to leave out: other packages, and tests, which contain unusual data.
_NOT_ITS_OWN = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}


@dataclass(frozen=True)
class Texts:
    """Texts by name. Prompts are taken from the first one."""

    by_name: dict[str, str]
    source: str

    @property
    def prompts(self) -> str:
        return next(iter(self.by_name.values()))

    def described(self) -> str:
        """One line with the name, size and source of the texts."""
        sizes = ", ".join(f"{name} {len(text.encode()) / 1e6:.2g} MB" for name, text in self.by_name.items())
        return f"{sizes}: {self.source}"


def texts_of(file: str | None) -> Texts:
    """The text of `file`, or prose (documentation) and code of Python's standard library if it is None.

    InputError if the file is not UTF-8; DataError if it is empty.
    """
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
    """The text between triple quotes, mostly English: lines without indentation, at most `_LIMIT` characters."""
    parts = [part for source in sources for part in source.split('"""')[1::2]]
    lines = [stripped for part in parts for line in part.split("\n") if (stripped := line.strip())]
    return "\n".join(lines)[:_LIMIT]
