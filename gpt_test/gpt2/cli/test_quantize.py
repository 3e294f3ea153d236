"""`gpt2 quantize`: a folder that other commands accept, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2.reference.numpy_model import NumpyGPT2
from gpt_config.errors import CheckpointError


def test_the_folder_is_a_model_like_others(run_command, small_folder: Path, tmp_path: Path) -> None:
    result = run_command("quantize", small_folder, "--out", tmp_path / "q")
    assert (result.status, result.out) == (0, "") and result.err == f"done: the int8 model is in {tmp_path / 'q'}\n"
    options = ["The cat", "--max_tokens", "5"]
    from_folder = run_command("generate", *options, "--from_pretrained", tmp_path / "q")
    assert from_folder.out == run_command("generate", *options, "--from_pretrained", small_folder, "--dtype", "int8").out


def test_mistakes_are_one_line(run_command, small_folder: Path, tmp_path: Path) -> None:
    for arguments, status, message in (
        (["quantize", small_folder, "--out", small_folder], 2, "already contains a model or an adapter"),
        (["quantize", small_folder, "--out", ""], 2, "--out is empty"),
        (["quantize", tmp_path / "none", "--out", tmp_path / "q"], 1, "none"),
    ):
        result = run_command(*arguments)
        assert result.status == status and message in result.err and len(result.err.splitlines()) == 1


def test_what_cannot_read_int8_refuses_it(run_command, small_folder: Path, tmp_path: Path) -> None:
    assert run_command("quantize", small_folder, "--out", tmp_path / "q").status == 0
    message = "contains int8 weights, but floats are needed: use the model before quantization"
    result = run_command("verify", tmp_path / "q")
    assert (result.status, result.out) == (1, "") and message in result.err and len(result.err.splitlines()) == 1
    with pytest.raises(CheckpointError, match=message):
        NumpyGPT2.from_pretrained(tmp_path / "q")
