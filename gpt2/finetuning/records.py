"""Read records from CSV, TSV, JSON and JSONL files, each with its line or item number. Does not depend on the task."""

from __future__ import annotations

import codecs
import csv
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

from gpt_config.errors import DataError, GPT2Warning

T = TypeVar("T")
Fields = Mapping[str, Any]


class BadRecord(Exception):
    """Why a record cannot be used. `read_records` adds the file and the line."""


@dataclass(frozen=True)
class Records(Generic[T]):
    """What was made of the records, and why others could not be used ("file, line 7: reason")."""

    made: list[T]
    bad: list[str]


def read_records(
    paths: Sequence[str | Path],
    make: Callable[[Fields], T],
    *,
    columns: Callable[[list[str]], tuple[str, ...] | None] = lambda first_row: None,
    skip_bad: bool = False,
) -> Records[T]:
    """Return `make(fields)` of each record of the files.

    `columns` gets the first row of each table (CSV, TSV). It returns the names of the columns, or None if that row contains
    them.

    A record is bad if its format is not valid, or if `make` raises BadRecord. A bad record is a DataError that names its
    line. With `skip_bad`, it is skipped and listed in `bad`, and a warning counts the skipped records. DataError if none
    remains.
    """
    made: list[T] = []
    bad: list[str] = []
    for path in map(Path, paths):
        for place, fields in _rows(path, columns):
            try:
                if isinstance(fields, BadRecord):
                    raise fields
                made.append(make(fields))
            except BadRecord as error:
                reason = f"{path}, {place}: {error}"
                if not skip_bad:
                    raise DataError(f"{reason}: fix or remove it, or skip such rows with skip_bad") from None
                bad.append(reason)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        warnings.warn(f"rows skipped: {len(bad)} ({bad[0]}{more})", GPT2Warning, 2)
    if not made:
        raise DataError(f"{', '.join(map(str, paths)) or 'no file'}: there is no usable row: add data")
    return Records(made, bad)


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): check the path") from None
    if b"\0" in content:
        raise DataError(f"{path} is not text: decompress it, or convert it to UTF-8")
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")


def _rows(path: Path, columns: Callable[[list[str]], tuple[str, ...] | None]) -> Iterator[tuple[str, Fields | BadRecord]]:
    text = _read(path)
    if path.suffix == ".json":
        return _json(path, text)
    if _is_json(path, text):
        return _jsonl(text)
    cells = _cells(text, _is_tsv(path, text))
    _, row = first = next(cells, ("", []))
    try:
        names = None if isinstance(row, BadRecord) or not row else columns(row)
    except BadRecord as error:
        raise DataError(f"{path} {error}") from None
    return _table(chain([first] if row else [], cells), names)


def _is_json(path: Path, text: str) -> bool:
    return path.suffix in (".json", ".jsonl") or (path.suffix not in (".csv", ".tsv") and text.lstrip()[:1] == "{")


def _is_tsv(path: Path, text: str) -> bool:
    return path.suffix == ".tsv" or (path.suffix != ".csv" and "\t" in text.partition("\n")[0])


def _json(path: Path, text: str) -> Iterator[tuple[str, Fields | BadRecord]]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): fix it, or name it .jsonl if it has one object per line") from None
    if not isinstance(items, list):
        raise DataError(f"{path} is not a JSON list of records: put the records into a list")
    for number, item in enumerate(items, 1):
        yield f"item {number}", _checked(item)


def _jsonl(text: str) -> Iterator[tuple[str, Fields | BadRecord]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"line {number}", BadRecord(f"it is not JSON ({error})")
            continue
        yield f"line {number}", _checked(item)


def _table(
    cells: Iterable[tuple[str, list[str] | BadRecord]], columns: tuple[str, ...] | None
) -> Iterator[tuple[str, Fields | BadRecord]]:
    names = columns
    for place, row in cells:
        if isinstance(row, BadRecord):
            yield place, row
        elif names is None:
            names = tuple(name.strip() for name in row)
        elif len(row) != len(names):
            yield place, BadRecord(f"it has {len(row)} columns instead of {len(names)}")
        else:
            yield place, _checked(dict(zip(names, row, strict=True)))


def _cells(text: str, is_tsv: bool) -> Iterator[tuple[str, list[str] | BadRecord]]:
    csv.field_size_limit(1 << 30)
    lines = io.StringIO(text, newline="")
    # TSV has no quoting, because a " in a text is nearly always an ordinary character.
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else csv.reader(lines, strict=True)
    begins = 1
    while True:
        try:
            row: list[str] | BadRecord = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = BadRecord(str(error))
        if row:
            yield f"line {begins}", row
        begins = reader.line_num + 1


def _checked(item: Any) -> Fields | BadRecord:
    if not isinstance(item, dict):
        return BadRecord(f"it is {type(item).__name__}, not an object with named fields")
    try:
        json.dumps(item, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # lone surrogates: bytes that were not UTF-8
        return BadRecord("it is not UTF-8")
    return item


def text_of(fields: Fields, name: str, *, default: str | None = None) -> str:
    """Return the text of the field `name`. BadRecord if it is not a string, or is missing or empty and has no `default`."""
    value = fields.get(name)
    if value is None:
        value = default
    if value is None:
        raise BadRecord(f"there is no field {name!r} (it has {', '.join(map(repr, fields)) or 'none'})")
    if not isinstance(value, str):
        raise BadRecord(f"the field {name!r} is {type(value).__name__}, not text")
    if not value.strip() and default is None:
        raise BadRecord(f"the field {name!r} is empty")
    return value
