"""Read records, objects with named fields, from every format that has them. It does not depend on what fields mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from gpt2.data.arrow import arrow_rows
from gpt2.data.json_records import NotJSON, json_lines, json_list
from gpt2.data.kind import ARROW, JSON, JSONL, PARQUET, Kind, kind_of
from gpt2.data.source import Source
from gpt2.data.tables import BadRow, Dialect, default_separator, dialect_of, rows_of
from gpt_config.errors import DataError

Fields = Mapping[str, Any]
# Gets the first row of a table. Returns the names of the columns, or None if that row contains them.
Columns = Callable[[list[str]], tuple[str, ...] | None]


class BadRecord(Exception):
    """Why a record cannot be used. Its reader adds the file and the line."""


def names_in_first_row(first_row: list[str]) -> tuple[str, ...] | None:
    """The `Columns` of tables whose first row has the names."""
    return None


def records_of(
    source: Source,
    columns: Columns = names_in_first_row,
    *,
    wanted: tuple[str, ...] = (),
    label_at: int = 0,
    kind: Kind | None = None,
    tell: Callable[[str], None] = lambda line: None,
    column: str | None = None,
) -> Iterator[tuple[str, Fields | BadRecord]]:
    """Yield (place, record) of a file: "line 7" of a text, "item 7" of a JSON list, "row 7" of Parquet and Arrow.

    A text that is neither JSON lines nor a JSON list is a table. `wanted` and `label_at` are as in `dialect_of`. `tell` gets
    a line if the separator is not the one that the file's name lets expect. `column` is the only column that is needed; an
    item that is a text is the value of that column.

    Texts may have lone surrogates: bytes that were not UTF-8, or half a pair in JSON.
    """
    kind = kind or kind_of(source)
    if kind.is_tokens:
        raise DataError(f"{source.name} contains token ids, not records: name a table, JSONL, JSON or Parquet")
    if kind.name in (PARQUET, ARROW):
        rows: Iterable[tuple[str, Any]] = arrow_rows(source, kind.name, column)
    elif kind.name == JSON:
        rows = json_list(source, kind.encoding)
    elif kind.name == JSONL:
        rows = json_lines(source, kind.encoding)
    else:
        dialect = dialect_of(source, kind.encoding, wanted, label_at)
        if dialect.separator != default_separator(source.suffix) or dialect == Dialect("\t"):
            tell(dialect.describe(source.name))
        yield from _table(source, kind.encoding, dialect, columns, wanted)
        return
    for place, item in rows:
        yield place, _as_fields({column: item} if column and isinstance(item, str) else item)


def _table(
    source: Source, encoding: str, dialect: Dialect, columns: Columns, wanted: tuple[str, ...]
) -> Iterator[tuple[str, Fields | BadRecord]]:
    cells = rows_of(source, encoding, dialect)
    _, first_row = first = next(cells, ("", []))
    try:
        names = None if isinstance(first_row, BadRow) or not first_row else columns(first_row)
    except BadRecord as error:
        raise DataError(f"{source.name} {error}") from None
    for place, row in chain([first] if first_row else [], cells):
        if isinstance(row, BadRow):
            yield place, BadRecord(row)
        elif names is None:
            names = tuple(name.strip() for name in row)
            if twice := [name for name in wanted if names.count(name) > 1]:
                raise DataError(f"{source.name} has {names.count(twice[0])} columns {twice[0]!r}: rename all but one")
        elif len(row) != len(names):
            yield place, BadRecord(f"it has {len(row)} columns instead of {len(names)}")
        else:
            yield place, dict(zip(names, row, strict=True))


def _as_fields(item: Any) -> Fields | BadRecord:
    if isinstance(item, NotJSON):
        return BadRecord(f"it is not JSON ({item})")
    if not isinstance(item, dict):
        return BadRecord(f"it is {type(item).__name__}, not an object with named fields")
    return item


def check_is_unicode(fields: Fields) -> None:
    """Raise BadRecord if a text of the record has a lone surrogate."""
    try:
        json.dumps(fields, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise BadRecord("it is not UTF-8") from None


def numbered_columns(first_row: list[str], wanted: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names "1", "2", ... of the columns if `wanted` are numbers and `first_row` does not have such names."""
    found = {name.strip() for name in first_row}
    if set(wanted) <= found or not all(name.isdigit() for name in wanted):
        return None
    return tuple(str(number) for number in range(1, len(first_row) + 1))


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
