"""`gpt2 export` and `gpt2 import`: messages, and one line for every mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.weights.foreign import TITLES, WRITTEN_TITLES
from gpt_encoder import load_tokenizer


@pytest.mark.parametrize("name", ["openai", "nanogpt", "llmc"])
def test_there_and_back(name: str, run_command: Callable, small_folder: Path, small_model: GPT2, tmp_path: Path) -> None:
    file, out = tmp_path / "file", tmp_path / "imported"
    result = run_command("export", small_folder, "--to", name, "--out", file)
    *warnings, done = result.err.splitlines()
    assert result.status == 0 and done.startswith(f"done: {file} is {TITLES[name]} in float32; ")
    assert [line.startswith("warning: nanoGPT computes the exact GELU") for line in warnings] == [True] * (name == "nanogpt")
    result = run_command("generate", "a", "--from_pretrained", file)
    assert result.status == 1 and result.err == (
        f"error: {file} is {TITLES[name]}, not a model folder: convert it first, and use the result "
        f"(gpt2 import --out FOLDER {file})\n"
    )
    result = run_command("import", file, "--out", out, *([] if name == "openai" else ["--tokenizer", small_folder]))
    assert (result.status, result.err) == (0, f"done: the model of {TITLES[name]} is in {out}, in float32\n")
    found = GPT2.from_pretrained(out)
    for key, tensor in found.state_dict().items():
        assert torch.equal(tensor, small_model.state_dict()[key]), key
    assert found.config.activation_function == ("gelu" if name == "nanogpt" else "gelu_new")
    assert found.config.eos_token_id == small_model.config.eos_token_id
    assert load_tokenizer(out).token_bytes == load_tokenizer(small_folder).token_bytes


@pytest.mark.parametrize(("name", "package"), [("onnx", "onnxruntime"), ("ctranslate2", "ctranslate2")])
def test_what_can_only_be_written_is_not_read(
    name: str, package: str, run_command: Callable, small_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed (pip install -r requirements-dev.txt)")
    out = tmp_path / "out"
    result = run_command("export", small_folder, "--to", name, "--out", out)
    title = WRITTEN_TITLES[name]
    assert (result.status, result.err) == (
        0, f"done: {out} is {title} in float32; 20 of 20 greedy tokens are those of the model\n"
    )  # fmt: skip
    for command in (("generate", "a", "--from_pretrained", out), ("import", out, "--out", tmp_path / "imported")):
        result = run_command(*command)
        assert result.status == 1 and result.err == (
            f"error: {out} is {title}, which can only be written: use the model that it was made from\n"
        )


def test_mistakes_are_one_line(run_command: Callable, small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a text, but no model")
    out = tmp_path / "new"
    for arguments, message in (
        (("export", small_folder, "--to", "llmc", "--out", tmp_path / "text"), "exists: choose another path"),
        (("export", small_folder, "--to", "llmc", "--dtype", "q8_0", "--out", out), "use float32 or bfloat16"),
        (("import", tmp_path / "text", "--out", out), "is none of these: a TensorFlow checkpoint, a nanoGPT checkpoint"),
        (("import", tmp_path / "text", "--from", "llmc", "--out", out), "is not an llm.c model"),
        (("import", "", "--out", out), "FILE is empty"),
        (("import", tmp_path / "none", "--out", out), "there is no file or folder"),
        (("import", tmp_path / "text", "--out", small_folder), "already contains a model"),
    ):
        result = run_command(*arguments)
        assert result.status and message in result.err and result.err.count("\n") == 1, (arguments, result.err)
        assert not out.exists()


def test_a_file_without_a_known_tokenizer_gives_a_warning(run_command: Callable, small_folder: Path, tmp_path: Path) -> None:
    run_command("export", small_folder, "--to", "llmc", "--out", tmp_path / "model.bin")
    result = run_command("import", tmp_path / "model.bin", "--out", tmp_path / "out")
    assert "warning:" in result.err and "name it with --tokenizer" in result.err
    assert not (tmp_path / "out" / "tokenizer.json").exists()
