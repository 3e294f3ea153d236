"""Make objects from the records of files, and report the bad ones with file and line. Does not depend on the task."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from gpt2.data.folders import list_files
from gpt2.data.kind import TABLE, TEXT, kind_of
from gpt2.data.records import (
    BadRecord,
    Columns,
    Fields,
    check_is_unicode,
    names_in_first_row,
    numbered_columns,
    records_of,
    text_of,
)
from gpt2.data.source import Source
from gpt_config.errors import DataError, GPT2Warning

__all__ = [
    "BadRecord",
    "Fields",
    "Records",
    "files_of",
    "fingerprint_of",
    "has_tables",
    "labelled_columns",
    "read_records",
    "text_of",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Records(Generic[T]):
    """What was made of the records, and why others could not be used ("file, line 7: reason")."""

    made: list[T]
    bad: list[str]


def read_records(
    paths: Sequence[str | Path | Source],
    make: Callable[[Fields], T],
    *,
    columns: Columns = names_in_first_row,
    wanted: tuple[str, ...] = (),
    label_at: int = 0,
    skip_bad: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Records[T]:
    """Return `make(fields)` of each record of the files, and of the data files in folders.

    `columns` gets the first row of each table (CSV, TSV). It returns the names of the columns, or None if that row contains
    them. `wanted` and `label_at` help to find the separator of a table: see `gpt2.data.tables.dialect_of`. `tell` gets lines
    on what is read.

    A record is bad if its format is not valid, or if `make` raises BadRecord. A bad record is a DataError that names its
    line. With `skip_bad`, it is skipped and listed in `bad`, and a warning counts the skipped records. DataError if none
    remains.
    """
    made: list[T] = []
    bad: list[str] = []
    for source in _sources(paths, tell):
        for place, fields in records_of(source, columns, wanted=wanted, label_at=label_at, tell=tell):
            try:
                if isinstance(fields, BadRecord):
                    raise fields
                check_is_unicode(fields)
                made.append(make(fields))
            except BadRecord as error:
                reason = f"{source.name}, {place}: {error}"
                if not skip_bad:
                    remedy = "fix or remove it, or skip such rows with --skip_bad (in Python skip_bad=True)"
                    raise DataError(f"{reason}: {remedy}") from None
                bad.append(reason)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        warnings.warn(f"rows skipped: {len(bad)} ({bad[0]}{more})", GPT2Warning, 2)
    if not made:
        names = [path.name if isinstance(path, Source) else str(path) for path in paths]
        raise DataError(f"{', '.join(names) or 'no file'}: there is no usable row: add data")
    return Records(made, bad)


def _sources(paths: Sequence[str | Path | Source], tell: Callable[[str], None]) -> Iterator[Source]:
    for path in paths:
        if isinstance(path, Source):
            yield path
            continue
        listing = list_files([path])
        for line in listing.lines():
            tell(line)
        yield from (Source(str(file)) for file in listing.files)


def files_of(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files that `read_records` reads for these paths."""
    return list(list_files(paths).files)


def has_tables(paths: Sequence[str | Path]) -> bool:
    """Whether one of the files is a table, whose separator was found by its content."""
    return any(kind_of(Source(str(path))).name in (TABLE, TEXT) for path in files_of(paths))


def fingerprint_of(paths: Sequence[str | Path], *more: object) -> str:
    """Return a hash of the content of the files of `paths` and of `more`."""
    digest = hashlib.sha256(repr(more).encode())
    for path in files_of(paths):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def labelled_columns(text_column: str, label_column: str, tell: Callable[[str], None]) -> Columns:
    """Return the `Columns` of tables with a text and a label.

    A first row with both names has the names of the columns. Names may also be numbers of columns, from 1. If the first row
    has no names, the default names mean: the label, then the text. BadRecord for any other first row.
    """
    wanted = (label_column, text_column)

    def columns(first_row: list[str]) -> tuple[str, ...] | None:
        found = [name.strip() for name in first_row]
        if set(wanted) <= set(found):
            return None
        if numbers := numbered_columns(first_row, wanted):
            return numbers
        has_names = {name.lower() for name in wanted} & {name.lower() for name in found}
        if wanted == ("label", "text") and len(first_row) == 2 and not has_names:
            tell("where the first line has no column names, the first column is the label and the second the text")
            return wanted
        raise BadRecord(
            f"has no columns {wanted[0]!r} and {wanted[1]!r} (it has {', '.join(map(repr, found))}): "
            "set label_column and text_column to names or numbers of columns"
        )

    return columns
