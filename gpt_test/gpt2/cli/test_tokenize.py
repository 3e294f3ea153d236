"""`gpt2 tokenize`: ids, pieces and byte spans."""

from __future__ import annotations

import json

import pytest


def test_ids_spans_and_pieces(run_command) -> None:
    result = run_command("tokenize", "Hi 🦙\n")
    lines = [line.split(maxsplit=2) for line in result.out.splitlines()]
    assert lines[0] == ["17250", "0-2", "'Hi'"]
    assert lines[1] == ["12520", "2-5", r"b' \xf0\x9f'"]
    assert lines[-1][2] == r"'\n'"
    assert result.err == "5 tokens, 8 bytes, 5 characters\n"


def test_json(run_command) -> None:
    item = json.loads(run_command("tokenize", "a é<|endoftext|>", "--json", "--allow_special").out)
    assert item == {
        "ids": [64, 38251, 50256],
        "pieces": ["a", " é", "<|endoftext|>"],
        "byte_spans": [[0, 1], [1, 4], [4, 17]],
        "model": "gpt2",
    }


def test_special_text_is_text(run_command) -> None:
    assert "50256" not in run_command("tokenize", "<|endoftext|>").out


def test_stdin_and_folder(run_command, small_folder, small_tokenizer) -> None:
    result = run_command("tokenize", "-", "--model_name", small_folder, "--json", stdin=b"the cat")
    assert json.loads(result.out)["ids"] == small_tokenizer.encode("the cat")


@pytest.mark.parametrize(("args", "status"), [([], 2), (["x", "--model_name", "no/such/place"], 1), (["x\udcff"], 1)])
def test_a_mistake_is_one_line(run_command, args, status: int) -> None:
    result = run_command("tokenize", *args)
    assert result.status == status and result.out == "" and len(result.err.splitlines()) == 1
