"""Read tables: which character separates the columns and whether quotes enclose texts, decided for each file by its content.

A table is CSV with commas or semicolons, or TSV. It does not know what columns mean.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from gpt2.data.kind import HEAD_BYTES
from gpt2.data.source import Source
from gpt2.data.text import TextBlocks

SAMPLE_CHARACTERS = 1 << 20  # of a file, from which its dialect is decided
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_ROWS_TO_SEE = 50  # lines of a text, to see whether it is a table
_MOST_OF = 0.9  # share of rows that have the width of the first row


class BadRow(str):
    """Why a row cannot be read."""


@dataclass(frozen=True)
class Dialect:
    """How a table is written. `is_quoted`: a field in quotes may contain separators, line ends and doubled quotes."""

    separator: str
    is_quoted: bool = True
    names_separator: bool = False  # the first line is "sep=;", as spreadsheets write it

    def describe(self, name: str) -> str:
        """The line to show about the file `name`."""
        quotes = "quotes enclose texts" if self.is_quoted else "quotes are ordinary characters"
        return f"{name}: columns separated by {SEPARATORS.get(self.separator, repr(self.separator))}, {quotes}"


def default_separator(suffix: str) -> str:
    """The separator that a name ends in: tabs for .tsv, otherwise commas."""
    return "\t" if suffix == ".tsv" else ","


def dialect_of(source: Source, encoding: str, wanted: Sequence[str] = (), label_at: int = 0) -> Dialect:
    """Return the dialect of a table, from its first rows.

    `wanted` are names of columns: a separator that gives them in the first row is right. In a table without names,
    `label_at` is the index of the column that has short texts, which do not contain a separator.
    """
    lines, n_characters, is_whole = [], 0, True
    for line in TextBlocks(source, encoding).any_lines():
        if n_characters >= SAMPLE_CHARACTERS:
            is_whole = False
            break
        lines.append(line)
        n_characters += len(line)
    return sniff(lines, default_separator(source.suffix), wanted, label_at, is_whole=is_whole)


def sniff(
    lines: Sequence[str], preferred: str = ",", wanted: Sequence[str] = (), label_at: int = 0, *, is_whole: bool = True
) -> Dialect:
    """Return the dialect of a table with these first `lines`. See `dialect_of`; `preferred` is taken if nothing decides."""
    first = lines[0].strip() if lines else ""
    if first.lower().startswith("sep=") and len(first) == 5:
        inner = sniff(lines[1:], first[4], wanted, label_at, is_whole=is_whole)
        is_quoted = _has_quoting(lines[1:], is_whole) if first[4] == "\t" else True
        return Dialect(first[4], is_quoted if inner.separator == first[4] else True, names_separator=True)
    dialects = [Dialect(separator, separator != "\t" or _has_quoting(lines, is_whole)) for separator in SEPARATORS]
    read = {dialect: _sample(lines, dialect, is_whole) for dialect in dialects}

    def fit(dialect: Dialect) -> tuple[bool, bool, bool, float, bool, float]:
        found = read[dialect]
        header = {cell.strip() for cell in found[0]} if found else set()
        names_wanted = bool(wanted) and set(wanted) <= header
        width = len(found[0]) if found else 0
        share = sum(len(row) == width for row in found) / len(found) if width > 1 else 0.0
        others = [other.separator for other in dialects if other is not dialect]
        labels = [row[label_at] for row in found if label_at < len(row)]
        foreign = sum(any(other in label for other in others) for label in labels) / max(1, len(labels))
        variety = len(set(labels)) / max(1, len(labels))
        is_preferred = dialect.separator == preferred
        return names_wanted, share == 1, share > _MOST_OF, -foreign if share else -1.0, is_preferred, -variety

    return max(dialects, key=fit)


def _sample(lines: Sequence[str], dialect: Dialect, is_whole: bool) -> list[list[str]]:
    rows = [row for _, row in _rows(lines, dialect)]
    good = [row for row in rows if not isinstance(row, BadRow)]
    return good if is_whole or len(good) < 2 else good[:-1]  # the last row may be incomplete


def _has_quoting(lines: Sequence[str], is_whole: bool) -> bool:
    """Whether quotes enclose texts in a TSV, as csv.writer, pandas and spreadsheets write it, or are ordinary characters.

    They enclose texts if the lines have different numbers of columns without quoting, and all rows the same number with it.
    If both readings are possible, a writer decides that encloses a field only if it has to: some fields begin with a quote
    and have doubled quotes within, or all have quotes. Such a writer leaves no other field with a quote in it.
    """
    if not any('"' in line for line in lines):
        return False
    quoted: list[list[str]] = []
    for _, row in _rows(lines, Dialect("\t")):
        if isinstance(row, BadRow):
            if is_whole or len(quoted) < 2:
                return False
            break
        quoted.append(row)
    width = Counter(map(len, quoted)).most_common(1)[0][0] if quoted else 0
    if not quoted or any(len(row) != width for row in quoted[: None if is_whole else -1]):
        return False
    plain = [line.rstrip("\r\n").split("\t") for line in lines if line.strip()]
    if any(len(row) != width for row in plain):
        return True
    fields = [field for row in plain for field in row if field]
    if any('"' in field and not field.startswith('"') for field in fields):
        return False
    return any('""' in field[1:-1] for field in fields) or all(field[:1] == '"' for field in fields)


def rows_of(source: Source, encoding: str, dialect: Dialect) -> Iterator[tuple[str, list[str] | BadRow]]:
    """Yield ("line N", row) for each row that is not empty. The line is that on which the row begins."""
    lines: Iterable[str] = TextBlocks(source, encoding).any_lines()
    if dialect.names_separator:
        for place, row in _rows(islice(lines, 1, None), dialect):
            yield f"line {place + 1}", row
    else:
        for place, row in _rows(lines, dialect):
            yield f"line {place}", row


def _rows(lines: Iterable[str], dialect: Dialect) -> Iterator[tuple[int, list[str] | BadRow]]:
    csv.field_size_limit(1 << 30)
    if dialect.is_quoted:
        reader = csv.reader(lines, delimiter=dialect.separator, strict=True)
    else:
        reader = csv.reader(lines, delimiter=dialect.separator, quoting=csv.QUOTE_NONE)
    begins = 1
    while True:
        try:
            row: list[str] | BadRow = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = BadRow(error)
        if row:
            yield begins, row
        begins = reader.line_num + 1


def is_table_with(source: Source, encoding: str, column: str) -> bool:
    """Whether a text is a table whose first row names `column` and others, and whose rows have as many columns as it."""
    lines = list(islice(TextBlocks(source, encoding, HEAD_BYTES).any_lines(), _ROWS_TO_SEE))
    if len(lines) < 2 or column not in lines[0]:
        return False
    dialect = sniff(lines, wanted=(column,), is_whole=False)
    rows = _sample(lines, dialect, is_whole=len(lines) < _ROWS_TO_SEE)
    names = [name.strip() for name in rows[0]] if rows else []
    return column in names and len(names) > 1 and len(rows) > 1 and all(len(row) == len(names) for row in rows)


def starts_with_labels(source: Source, encoding: str, is_label: Callable[[str], bool]) -> bool:
    """Whether a text is a table of two columns without names, the first of which has labels only."""
    lines = list(islice(TextBlocks(source, encoding, HEAD_BYTES).any_lines(), _ROWS_TO_SEE))
    rows = _sample(lines, sniff(lines, is_whole=False), is_whole=len(lines) < _ROWS_TO_SEE)
    return bool(rows) and all(len(row) == 2 and is_label(row[0]) for row in rows)
