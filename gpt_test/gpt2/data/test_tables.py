"""Separators and quotes of tables are found from their content."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpt2.data.source import Source
from gpt2.data.tables import BadRow, dialect_of, is_table_with, rows_of, sniff

WANTED = ("label", "text")


def read(name: str, content: str, wanted: tuple[str, ...] = WANTED, label_at: int = 0) -> list[list[str] | BadRow]:
    source = Source(name, content.encode())
    dialect = dialect_of(source, "utf-8", wanted, label_at)
    return [row for _, row in rows_of(source, "utf-8", dialect)]


def written(rows: list[list[str]], separator: str, quoting: int, line_end: str = "\r\n") -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=line_end).writerows(rows)
    return file.getvalue()


CELL = st.text(st.sampled_from('ab,;"\t\n é'), min_size=1, max_size=12).filter(str.strip)


@given(
    st.lists(st.tuples(st.sampled_from(["glad", "sad"]), CELL), min_size=2, max_size=9),
    st.sampled_from(",;\t"),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["a.csv", "a.tsv", "a.txt"]),
)
def test_a_table_with_names_is_read_as_it_was_written(rows, separator: str, quoting: int, line_end: str, name: str) -> None:
    # A field in quotes with a tab after a line end gives lines of as many columns, so it may be what it seems.
    assume(separator != "\t" or not any("\n" in text and "\t" in text for _, text in rows))
    table = [["label", "text"], *map(list, rows)]
    assert read(name, written(table, separator, quoting, line_end)) == table


@given(
    st.lists(st.tuples(st.sampled_from(["glad", "sad", "so-so"]), st.text("ab,; ", min_size=1)), min_size=2, max_size=9),
    st.sampled_from(";\t"),
)
def test_without_names_labels_contain_no_separator(rows, separator: str) -> None:
    """Each text gets a comma, so commas would be a possible separator too."""
    table = [[label, f"x, {text.replace(separator, '')}"] for label, text in rows]
    content = "".join(separator.join(row) + "\n" for row in table)
    assert read("a.csv", content) == table


def test_the_label_may_be_the_last_column() -> None:
    assert read("a.csv", "I laughed, and danced;glad\nI wept, and wept;sad\n", ("2", "1"), 1)[0] == [
        "I laughed, and danced",
        "glad",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('label\ttext\nham\t"Hello there said he\nham\tfine\n', '"Hello there said he'),
        ('label\ttext\nham\tthe 5" disk\nham\tfine\n', 'the 5" disk'),
        ('label\ttext\nham\t"Hi"\nham\tfine\n', '"Hi"'),  # nothing needs quotes, so no writer has set them
        ('label\ttext\nham\t"Hi there\nham\tand there"\n', '"Hi there'),
        ('label\ttext\nham\t"Hi ""there"""\nham\tfine\n', 'Hi "there"'),
        ('"label"\t"text"\n"ham"\t"Hi"\n', "Hi"),
        ('label\ttext\nham\t"a\tb"\nham\tfine\n', "a\tb"),
        ('label\ttext\nham\t"a\nb"\nham\tfine\n', "a\nb"),
        ('label\ttext\nham\t"a\nb"\nham\t5" disk\n', "a\nb"),
    ],
)
def test_quotes_of_tsv(content: str, expected: str) -> None:
    assert read("a.tsv", content)[1][1] == expected


def test_a_csv_with_a_tab_in_its_first_line_has_commas() -> None:
    assert read("a.csv", 'label,text\tof all\ngood,one\nbad,"two\tthree"\n', ()) == [
        ["label", "text\tof all"],
        ["good", "one"],
        ["bad", "two\tthree"],
    ]


def test_a_spreadsheet_may_name_its_separator() -> None:
    source = Source("a.csv", b"sep=;\r\nlabel;text\r\nglad;a, b\r\n")
    dialect = dialect_of(source, "utf-8", WANTED)
    assert list(rows_of(source, "utf-8", dialect)) == [("line 2", ["label", "text"]), ("line 3", ["glad", "a, b"])]


def test_long_fields_and_old_line_ends() -> None:
    long = "x" * 200_000
    assert read("a.csv", f"label,text\rgood,{long}\r") == [["label", "text"], ["good", long]]


def test_a_bad_row_is_named_and_the_others_are_read() -> None:
    source = Source("a.csv", b'label,text\ngood,"a" b\nbad,c\n')
    rows = list(rows_of(source, "utf-8", sniff(["label,text\n"], wanted=WANTED)))
    assert isinstance(rows[1][1], BadRow) and rows[1][0] == "line 2" and rows[2] == ("line 3", ["bad", "c"])


@pytest.mark.parametrize(
    ("content", "is_table"),
    [
        ("label,text\ngood,one\n", True),
        ("id;text\n1;one, two\n", True),
        ("text\none\ntwo\n", False),
        ("A text, with commas\nand lines, more of them\n", False),
        ("This text, too\nbut, not, so\n", False),
    ],
)
def test_a_text_is_a_table_if_it_names_the_column(content: str, is_table: bool) -> None:
    assert is_table_with(Source("a.txt", content.encode()), "utf-8", "text") is is_table
