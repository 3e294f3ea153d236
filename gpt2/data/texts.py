"""Read texts one by one, each with its place, from records or from lines. It does not know what a text is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from gpt2.data.kind import TEXT, Kind, kind_of
from gpt2.data.records import BadRecord, Fields, check_is_unicode, numbered_columns, records_of
from gpt2.data.source import Source
from gpt2.data.tables import is_table_with
from gpt2.data.text import TextBlocks, replaced
from gpt_config.errors import DataError


class PlacedText(NamedTuple):
    """A text, its place for messages ("line 7"), and the other fields of its record."""

    text: str
    place: str
    fields: Fields


def texts_of(
    source: Source, text_field: str = "text", tell: Callable[[str], None] = lambda line: None
) -> Iterator[PlacedText]:
    """Yield the texts of a table, JSON lines, a JSON list, Parquet or Arrow, or each line of any other text.

    Empty texts and lines are yielded too, so that text N is that of record or line N. A text is a table if its first row
    names the column `text_field`. `tell` gets a line on the separators of a table. DataError for a record without a text.
    """
    kind = kind_of(source)
    if kind.name == TEXT and not is_table_with(source, kind.encoding, text_field):
        yield from lines_of(source, kind)
        return

    def columns(first_row: list[str]) -> tuple[str, ...] | None:
        return numbered_columns(first_row, (text_field,))

    for place, fields in records_of(source, columns, wanted=(text_field,), kind=kind, tell=tell):
        try:
            if isinstance(fields, BadRecord):
                raise fields
            check_is_unicode(fields)
            others = {name: value for name, value in fields.items() if name != text_field}
            yield PlacedText(_text_in(fields, text_field), place, others)
        except BadRecord as error:
            raise DataError(f"{source.name}, {place}: {error}: fix or remove it") from None


def lines_of(source: Source, kind: Kind) -> Iterator[PlacedText]:
    """Yield each line without its end. DataError for a line that is not UTF-8."""
    for number, line in enumerate(TextBlocks(source, kind.encoding).lines(), 1):
        text = line.removesuffix("\n").removesuffix("\r")
        if replaced(text)[1]:
            raise DataError(f"{source.name}, line {number}: it is not UTF-8 text: convert it")
        yield PlacedText(text, f"line {number}", {})


def _text_in(fields: Fields, name: str) -> str:
    if name not in fields:
        raise BadRecord(f"there is no field {name!r} (it has {', '.join(map(repr, fields)) or 'none'})")
    if not isinstance(value := fields[name], str):
        raise BadRecord(f"the field {name!r} is {type(value).__name__}, not text")
    return value
