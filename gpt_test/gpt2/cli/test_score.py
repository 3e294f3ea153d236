"""`gpt2 score`: texts from files and standard input, in three formats."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2 import GPT2
from gpt2.evaluation.token_scores import score_tokens, totals
from gpt_encoder import GPT2Tokenizer


def test_a_json_object_per_text(
    run_command: Callable, tmp_path: Path, small_folder: Path, small_model: GPT2, small_tokenizer: GPT2Tokenizer
) -> None:
    (tmp_path / "a.txt").write_text("The old dog\n", encoding="utf-8")
    result = run_command(
        "score", tmp_path / "a.txt", "-", "--format", "json", "--from_pretrained", small_folder, stdin="é cat\n".encode()
    )
    first, second = map(json.loads, result.out.splitlines())
    expected = score_tokens(small_model, small_tokenizer, "The old dog\n")
    assert [token["bits"] for token in first["tokens"]] == pytest.approx([score.bits for score in expected])
    assert [token["rank"] for token in first["tokens"]] == [score.rank for score in expected]
    assert first["total"]["log_prob"] == pytest.approx(totals(expected).log_prob)
    assert first["source"] == str(tmp_path / "a.txt") and second["source"] == "-"
    assert [token["piece"] for token in second["tokens"]][:2] == ["\\xc3", "\\xa9"]
    assert second["tokens"][-1]["byte_span"][1] == len("é cat".encode()), "without the last line end"


def test_a_table_shows_half_characters_as_bytes(run_command: Callable, small_folder: Path) -> None:
    result = run_command("score", "-", "--from_pretrained", small_folder, "--stride", 5, stdin="é\tcat".encode())
    assert result.status == 0 and r"b'\xc3'" in result.out and r"'\t'" in result.out and "==" not in result.out
    assert re.search(r"^\d+ tokens, log p -[\d.]+, [\d.]+ bits \([\d.]+ per byte\), perplexity", result.out, re.MULTILINE)


def test_colours_have_a_legend_and_no_control_characters(run_command: Callable, small_folder: Path) -> None:
    text = "é cat\x1b[2J\x9b2J\r\nend"
    result = run_command("score", "-", "--from_pretrained", small_folder, "--format", "color", stdin=text.encode())
    assert "1 bit or less" in result.out and "\x9b" not in result.out
    shown = re.sub(r"\x1b\[(48;5;\d+|38;5;16|0)m", "", result.out)
    assert "é cat\u241b[2J\ufffd2J\u240d\u21b5\nend" in shown and "\x1b" not in shown


def test_each_mistake_is_one_line(run_command: Callable, tmp_path: Path, small_folder: Path) -> None:
    (tmp_path / "bad").write_bytes(b"a\xff")
    for args, status, words in (
        ([tmp_path / "none"], 1, "cannot read"),
        ([tmp_path / "bad"], 1, "is not UTF-8"),
        (["-", "--stride", 41], 2, "--stride=41"),
        ([], 2, "Missing argument"),
    ):
        result = run_command("score", *args, "--from_pretrained", small_folder, stdin=b"The cat")
        assert result.status == status and words in result.err and result.err.count("\n") == 1, result.err


def test_an_empty_text_has_no_tokens(run_command: Callable, small_folder: Path) -> None:
    for style in ("table", "color", "json"):
        result = run_command("score", "-", "--from_pretrained", small_folder, "--format", style)
        assert result.status == 0 and re.search('0 tokens|"tokens": 0', result.out)
