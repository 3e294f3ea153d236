"""`--threads`: each command that computes has it, says so, and leaves the process as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.cli.group import load_command
from gpt_config.cores import process_limit

ROOT = Path(__file__).resolve().parents[3]
COMPUTING = ("benchmark", "classify", "evaluate", "finetune", "generate", "quantize", "score", "train", "verify")


@pytest.mark.parametrize("name", COMPUTING)
def test_commands_that_compute_have_it(name: str) -> None:
    assert any("--threads" in parameter.opts for parameter in load_command(name).params)


def test_the_number_holds_for_the_command(run_command: Callable, small_folder: Path) -> None:
    before = torch.get_num_threads(), process_limit()
    result = run_command(
        "generate", "The cat", "--from_pretrained", small_folder, "--max_tokens", 3, "--threads", 2, "--verbose"
    )
    assert result.status == 0 and ", 2 threads (--threads 2)\n" in result.err
    assert (torch.get_num_threads(), process_limit()) == before


@pytest.mark.parametrize("count", ["0", "-1", "1025", "two", "1.5"])
def test_another_number_is_a_wrong_call(run_command: Callable, small_folder: Path, count: str) -> None:
    result = run_command("generate", "The cat", "--from_pretrained", small_folder, "--threads", count)
    assert result.status == 2 and result.out == ""
    assert result.err.startswith("error: Invalid value for '--threads'") and result.err.count("\n") == 1


def test_a_training_run_says_so_and_can_be_repeated(run_command: Callable, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
    sizes = "--tokenizer char --n_layer 1 --n_head 1 --n_embd 8 --context 8 --batch_size 2 --max_steps 4 --eval_batches 1"
    for name in ("first", "second"):
        options = ["--data", tmp_path / "text.txt", "--out", tmp_path / name, *sizes.split(), "--threads", 2]
        result = run_command("train", *options)
        assert result.status == 0 and "\ncomputing on cpu, 2 threads (--threads 2)\n" in result.err
    first, second = (GPT2.from_pretrained(tmp_path / name).state_dict() for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_it_holds_before_torch_is_imported(small_folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | {"GPT2_THREADS": ""}
    arguments = ["generate", "A", "--from_pretrained", str(small_folder), "--max_tokens", "2", "--threads", "3", "--verbose"]
    command = [sys.executable, "-m", "gpt2", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and ", 3 threads (--threads 3)\n" in result.stderr, result.stderr


@pytest.mark.parametrize("name", COMPUTING)
def test_a_wrong_variable_ends_a_command_before_it_begins(name: str, tmp_path: Path) -> None:
    """One line, before torch is imported, files are read or written."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GPT2_THREADS": "many"}
    code = "import sys; from gpt2.cli import main; sys.modules['torch'] = None; main()"
    arguments = {
        "benchmark": [],
        "classify": ["a", "--from_pretrained", "b"],
        "finetune": ["--task", "instruction", "--data", "a", "--out", "b"],
        "quantize": ["a", "--out", "b"],
        "train": ["--data", "a", "--out", "b"],
    }.get(name, ["a"])
    result = subprocess.run(
        [sys.executable, "-c", code, name, *arguments], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode != 0 and not list(tmp_path.iterdir())
    assert result.stderr.startswith("error: GPT2_THREADS='many' must be") and result.stderr.count("\n") == 1, result.stderr
