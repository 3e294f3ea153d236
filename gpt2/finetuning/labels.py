"""The labels of records: one, several or a number for each text, and their split into parts. It knows no model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from gpt2.data.tables import SEPARATORS
from gpt2.finetuning.records import BadRecord, Fields, text_of
from gpt2.training.batches import shuffled
from gpt_config.errors import DataError

_WHOLE, _NUMBER = re.compile(r"^(-?\d+)\.0+$"), re.compile(r"-?\d+(\.\d+)?")

# What a record says: a label, several labels, or a number.
Label = str | tuple[str, ...] | float
# The same for training: the number of the label, 0 or 1 for each label, or the number.
Target = int | tuple[float, ...] | float


def label_of(fields: Fields, name: str, problem_type: str) -> Label:
    """Return the label in the field `name`. BadRecord if it is not what `problem_type` needs.

    Several labels are a JSON list, or a text with commas between them; an empty one is a text without labels.
    """
    value = fields.get(name)
    if problem_type == "regression":
        return _number(fields, name)
    if problem_type == "multi_label_classification":
        return _several(value.split(",") if isinstance(value, str) else value, fields, name)
    if isinstance(value, list):
        raise BadRecord(f"the field {name!r} is a list: use problem_type=multi_label_classification for several labels")
    return _one(value, fields, name)


def _one(value: object, fields: Fields, name: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):  # as a table of pandas marks a missing number
        raise BadRecord(f"the field {name!r} is {value!r}, not a label")
    return tidy_label(value if isinstance(value, int | float) else text_of(fields, name))


def tidy_label(value: object) -> str:
    """The name of a label: without spare spaces, and 1 for 1.0, which other programs write for the same label."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = " ".join(str(value).split())
    return _WHOLE.sub(r"\1", text)


def _several(values: object, fields: Fields, name: str) -> tuple[str, ...]:
    if isinstance(values, int | float):
        values = [values]
    if not isinstance(values, list):
        text_of(fields, name)  # raises BadRecord if the field is missing
        values = []
    for value in values:
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not (is_whole or isinstance(value, str)):
            raise BadRecord(f"the field {name!r} contains {value!r}: write labels as texts or whole numbers")
    names = map(tidy_label, values)
    return tuple(dict.fromkeys(label for label in names if label))


def _number(fields: Fields, name: str) -> float:
    value = fields.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = _float(value)
    else:
        number = _float(text_of(fields, name))
    if not math.isfinite(number):
        raise BadRecord(f"the field {name!r} is {value!r}, not a finite number")
    return number


def _float(value: str | float) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def names_of(labels: Sequence[Label], label_column: str) -> list[str]:
    """Return the sorted names of all labels; the column's name alone if they are the values of a regression.

    Names that are all numbers are in numerical order, so that label 2 comes before label 10.
    """
    names: set[str] = set()
    for label in labels:
        if isinstance(label, float):
            return [label_column]
        names.update((label,) if isinstance(label, str) else label)
    if all(map(_NUMBER.fullmatch, names)):
        return sorted(names, key=lambda name: (float(name), name))
    return sorted(names)


def suspicion_of(labels: Sequence[Label]) -> str:
    """Say that labels contain a character that may separate the columns of their table; "" if none does."""
    names = sorted({label for label in labels if isinstance(label, str)})
    for separator in SEPARATORS:
        if found := [name for name in names if separator in name]:
            return (
                f"{len(found)} of {len(names)} labels contain {separator!r}, such as {found[0]!r:.80}: "
                "is it the separator of the columns?"
            )
    return ""


def target_of(label: Label, names: Sequence[str]) -> Target:
    """Return `label` as a classifier with the labels `names` is trained on it."""
    if isinstance(label, float):
        return label
    if isinstance(label, str):
        return names.index(label)
    return tuple(float(name in label) for name in names)


def split_at_random(n_rows: int, fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Divide the indices 0 to n_rows - 1 into sorted parts: the remaining ones first, then a part for each of `fractions`.

    DataError if none remains.
    """
    rows = [shuffled(place, n_rows, seed, 7, 0) for place in range(n_rows)]
    parts, first = [], 0
    for fraction in fractions:
        n_part = max(1, round(fraction * n_rows)) if fraction else 0
        parts.append(sorted(rows[first : first + n_part]))
        first += n_part
    if first >= n_rows:
        raise DataError(f"there are {n_rows} rows, too few for all parts of the data: add some")
    return [sorted(rows[first:]), *parts]
