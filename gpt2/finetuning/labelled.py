"""Read texts to classify, with labels if there are any, from the files that fine-tuning reads, or one text per line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpt2.data.kind import TEXT, Kind, kind_of
from gpt2.data.records import BadRecord, Fields, check_is_unicode, numbered_columns, records_of, text_of
from gpt2.data.source import Source
from gpt2.data.tables import is_table_with, starts_with_labels
from gpt2.data.texts import lines_of
from gpt2.finetuning.labels import Label, label_of, tidy_label
from gpt2.finetuning.records import labelled_columns
from gpt_config.errors import DataError

_UNNAMED = re.compile(r"LABEL_(\d+)")


class TextToClassify(NamedTuple):
    """A text, its label (None if the file has none), and its place for messages."""

    text: str
    label: Label | None
    place: str


@dataclass(frozen=True)
class LabelledFiles:
    """How to read the texts of a classifier with these `labels`. A column of a table may be named by its number, from 1."""

    labels: Sequence[str]
    problem_type: str
    text_column: str = "text"
    label_column: str = "label"
    tell: Callable[[str], None] = lambda line: None

    def texts(self, source: Source) -> Iterator[TextToClassify]:
        """Yield the texts of a table, JSON lines, a JSON list, Parquet or Arrow, or of each line of any other text.

        A text is a table if its first row names the column of the text, or if its first column has labels of the classifier
        only. DataError for a record without a text.
        """
        kind = kind_of(source)
        if kind.name == TEXT and not self._is_table(source, kind):
            lines = lines_of(source, kind)
            yield from (TextToClassify(line.text, None, line.place) for line in lines if line.text.strip())
            return
        wanted = (self.label_column, self.text_column)
        label_at = int(self.label_column) - 1 if self.label_column.isdigit() else 0
        for place, fields in records_of(source, self._columns, wanted=wanted, label_at=label_at, tell=self.tell):
            try:
                if isinstance(fields, BadRecord):
                    raise fields
                check_is_unicode(fields)
                yield TextToClassify(text_of(fields, self.text_column), self._label(fields), place)
            except BadRecord as error:
                raise DataError(f"{source.name}, {place}: {error}: fix or remove it") from None

    def _is_table(self, source: Source, kind: Kind) -> bool:
        return is_table_with(source, kind.encoding, self.text_column) or (
            self.problem_type == "single_label_classification"
            and starts_with_labels(source, kind.encoding, lambda cell: self._known(tidy_label(cell)) in self.labels)
        )

    def _columns(self, first_row: list[str]) -> tuple[str, ...] | None:
        names = [name.strip() for name in first_row]
        if self.text_column in names:
            return None
        if numbers := numbered_columns(first_row, (self.text_column,)):
            return numbers
        return labelled_columns(self.text_column, self.label_column, self.tell)(first_row)

    def _label(self, fields: Fields) -> Label | None:
        if fields.get(self.label_column) in (None, ""):
            return None
        label = label_of(fields, self.label_column, self.problem_type)
        if isinstance(label, float):
            return label
        return self._known(label) if isinstance(label, str) else tuple(map(self._known, label))

    def _known(self, label: str) -> str:
        """The classifier's name for `label`: LABEL_1 for 1 if the classifier has no names of its own."""
        has_names = label in self.labels or not all(map(_UNNAMED.fullmatch, self.labels))
        return label if has_names else f"LABEL_{label}"

    def unknown(self, label: Label | None) -> str:
        """A label of a text that the classifier does not have; "" if it has them all."""
        if label is None or isinstance(label, float):
            return ""
        return next((name for name in ((label,) if isinstance(label, str) else label) if name not in self.labels), "")
