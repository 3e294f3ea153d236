"""`gpt2 embed`: one vector per line or record, in the format that the name of --out says, and one line per error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt2 import GPT2
from gpt2.evaluation import embed
from gpt_encoder import GPT2Tokenizer

TEXTS = ["the cat", "", "a boat\u2028 came home"]


@pytest.fixture
def vectors(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> np.ndarray:
    return embed(small_model, small_tokenizer, TEXTS).numpy()


def test_each_line_has_a_vector(run_command: Callable, small_folder: Path, tmp_path: Path, vectors: np.ndarray) -> None:
    """An empty line is a text too, so that row N is line N."""
    out = tmp_path / "new" / "vectors.npy"
    lines = ("\r\n".join(TEXTS) + "\r\n").encode()
    result = run_command("embed", "-", "--from_pretrained", small_folder, "--batch_size", 2, "--out", out, stdin=lines)
    assert result.status == 0 and result.err == f"3 vectors of 24 numbers, in {out}\n" and result.out == ""
    found = np.load(out)
    assert found.dtype == np.float32 and np.allclose(found, vectors, atol=1e-6)
    result = run_command("embed", "-", "--from_pretrained", small_folder, stdin=lines)
    objects = [json.loads(line) for line in result.out.splitlines()]
    assert [item["text"] for item in objects] == TEXTS
    assert np.allclose([item["embedding"] for item in objects], vectors, atol=1e-6)


def test_the_options_are_those_of_the_library(
    run_command: Callable, small_folder: Path, small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    """Each option alone changes the vectors, as it does in `embed`."""
    lines = "\n".join(TEXTS).encode()
    plain = embed(small_model, small_tokenizer, TEXTS)
    for options in ({"pooling": "last"}, {"layer": 1}, {"layer": -3}, {"normalize": True}):
        given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        out = tmp_path / "vectors.npy"
        result = run_command("embed", "-", "--from_pretrained", small_folder, *given, "--out", out, stdin=lines)
        assert result.status == 0, result.err
        expected = embed(small_model, small_tokenizer, TEXTS, **options)
        assert np.allclose(np.load(out), expected, atol=1e-6) and not np.allclose(expected, plain, atol=1e-2), options


def test_other_fields_are_carried(run_command: Callable, small_folder: Path, tmp_path: Path, vectors: np.ndarray) -> None:
    records = [{"id": number, "title": text, "text": "no", "model": "x"} for number, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    call = ["embed", tmp_path / "in.jsonl", "--text_field", "title", "--from_pretrained", small_folder, "--out"]
    result = run_command(*call, tmp_path / "out.jsonl")
    assert result.status == 0, result.err
    for number, line in enumerate((tmp_path / "out.jsonl").read_text().splitlines()):
        item = json.loads(line)
        assert np.allclose(item.pop("embedding"), vectors[number], atol=1e-6)
        carried = {"id": number, "input_text": "no", "input_model": "x"}
        assert item == {**carried, "text": TEXTS[number], "model": str(small_folder)}
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (pip install -r requirements-dev.txt)")
    result = run_command(*call, tmp_path / "out.parquet")
    assert result.status == 0, result.err
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["id", "input_text", "model", "text", "embedding"]
    assert np.allclose(np.array(table["embedding"].to_pylist()), vectors, atol=1e-6)
    result = run_command("embed", tmp_path / "out.parquet", "--from_pretrained", small_folder)
    first = json.loads(result.out.splitlines()[0])
    assert first["text"] == TEXTS[0] and np.allclose(first["input_embedding"], first["embedding"], atol=1e-6)
    records[1]["id"] = "one"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = run_command(*call, tmp_path / "mixed.parquet")
    assert result.status == 1 and "the field 'id' cannot be a column of Parquet" in result.err
    assert not (tmp_path / "mixed.parquet").exists()


@pytest.mark.parametrize(
    ("options", "stdin", "words"),
    [
        (["--out", "x.txt"], b"a", "--out 'x.txt' must end in .npy, .jsonl or .parquet"),
        (["--out", "x.npy", "--json"], b"a", "leave one of them out"),
        (["--layer", "3"], b"a", "--layer=3 must be a whole number from 0 (the embeddings) to 2"),
        ([], b"", "standard input has no text"),
        ([], b'{"a": "b"}\n', "line 1: there is no field 'text' (it has 'a')"),
        ([], b'{"text": "b"}\n{"text": 1}\n', "line 2: the field 'text' is int, not text"),
        ([], b"abcdefghi\xff\n", "line 1: it is not UTF-8 text"),
    ],
)
def test_a_mistake_is_one_line(
    run_command: Callable, small_folder: Path, options: list[str], stdin: bytes, words: str
) -> None:
    result = run_command("embed", "-", "--from_pretrained", small_folder, *options, stdin=stdin)
    assert result.status in (1, 2) and words in result.err and result.err.count("\n") == 1, result.err
    assert result.out == "" and not Path("x.npy").exists()


def test_the_missing_package_is_named(run_command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = run_command("embed", "-", "--out", "x.parquet", "--from_pretrained", "nowhere", stdin=b"a")
    assert result.status == 1 and "needs the package pyarrow: pip install '.[data]'" in result.err
