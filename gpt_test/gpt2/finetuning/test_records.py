"""Records are read from all formats. The error for a bad record names its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.finetuning.records import read_records, text_of
from gpt_config import DataError, GPT2Warning


def pair(fields) -> tuple[str, str]:
    return text_of(fields, "label"), text_of(fields, "text")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


EXPECTED = [("good", '"nice" ones, really'), ("bad", "line\u2028separators and\x85others")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", 'label\ttext\ngood\t"nice" ones, really\nbad\tline\u2028separators and\x85others\n'),
        ("no_suffix", 'label\ttext\r\ngood\t"nice" ones, really\r\nbad\tline\u2028separators and\x85others'),
        ("a.csv", '\ufefftext,label\n"""nice"" ones, really",good\nline\u2028separators and\x85others,bad\n\n'),
        ("a.json", json.dumps([{"label": label, "text": text} for label, text in EXPECTED])),
        ("a.jsonl", "\n".join(json.dumps({"label": label, "text": text}) for label, text in EXPECTED) + "\n\n"),
        ("lines", "\n".join(json.dumps({"label": label, "text": text}) for label, text in EXPECTED)),
    ],
)
def test_all_formats_give_the_same_records(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content)
    assert read_records([path], pair).made == EXPECTED
    assert read_records([path, path], pair).made == 2 * EXPECTED


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1))
def test_a_table_is_read_as_written(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    rows = [(a, b) for a, b in rows if a.strip() and b.strip() and (a + b).isprintable()] or [("a", "b")]
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "text"), *rows])
    assert read_records([path], pair).made == rows


def test_columns_without_names_are_named_by_the_caller(tmp_path: Path) -> None:
    path, other = write(tmp_path / "a.tsv", "good\tone\nbad\ttwo\n"), write(tmp_path / "b.tsv", "label\ttext\nodd\tthree\n")

    def columns(first_row: list[str]) -> tuple[str, str] | None:
        return None if "label" in first_row else ("label", "text")

    expected = [("good", "one"), ("bad", "two"), ("odd", "three")]
    assert read_records([path, other], pair, columns=columns).made == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'label,text\ngood,"two\nlines"\nbad\n', "line 4: it has 1 columns instead of 2"),
        ("a.tsv", "label\ttext\ngood\t\n", "line 2: the field 'text' is empty"),
        ("a.tsv", b"label\ttext\ngood\tok\nbad\t\xff\n", "line 3: it is not UTF-8"),
        ("a.jsonl", '{"label": "good", "text": "ok"}\n{"label": \n', "line 2: it is not JSON"),
        ("a.jsonl", '[1]\n', "line 1: it is list, not an object"),
        ("a.jsonl", '{"text": "x"}\n', "line 1: there is no field 'label' (it has 'text')"),
        ("a.csv", 'label,text\ngood,"unclosed\nbad,ok\n', "line 2: unexpected end of data"),
        ("a.jsonl", '{"label": "good", "text": "ok", "more": ["\\ud83d"]}', "line 1: it is not UTF-8"),
        ("a.json", '[{"label": "good", "text": 3}]', "item 1: the field 'text' is int, not text"),
    ],
)  # fmt: skip
def test_a_bad_row_is_an_error_or_skipped_and_counted(tmp_path: Path, name: str, content, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as raised:
        read_records([path], pair)
    assert f"{path}, {message}" in str(raised.value) and "skip_bad" in str(raised.value)
    good = write(tmp_path / "good.tsv", "label\ttext\ngood\tok\n")
    with pytest.warns(GPT2Warning, match=r"^rows skipped: 1 .*" + name):
        records = read_records([good, path], pair, skip_bad=True)
    assert len(records.bad) == 1 and message in records.bad[0]
    assert ("good", "ok") in records.made


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "{}", "is not a JSON list"),
        ("a.csv", "", "there is no usable row"),
        ("a.csv", "label,text\n", "there is no usable row"),
        ("a.csv", b"\x1f\x8b\0\0", "cannot read .*a.csv"),
    ],
)
def test_a_file_without_records_is_an_error(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_records([write(tmp_path / name, content)], pair, skip_bad=True)
    with pytest.raises(DataError, match=r"there is no file or folder .*nowhere.csv"):
        read_records([tmp_path / "nowhere.csv"], pair)
