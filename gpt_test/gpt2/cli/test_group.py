"""The `gpt2` command itself: help, version, completion, and the list of commands."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

import gpt2
from gpt2.cli.model_option import load_model_option

ROOT = Path(__file__).resolve().parents[3]


def test_help_and_version(run_command) -> None:
    for args in ([], ["--help"], ["-h"]):
        result = run_command(*args)
        assert result.status == 0 and "generate" in result.out and "tokenize" in result.out
    assert run_command("--version").out == f"gpt2, version {gpt2.__version__}\n"


def test_an_unknown_command_is_one_line(run_command) -> None:
    result = run_command("train-a-dragon")
    assert result.status == 2 and result.out == ""
    assert result.err.startswith("error: No such command") and len(result.err.splitlines()) == 1


def test_shell_completion(run_command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_GPT2_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "gpt2 generate --top")
    monkeypatch.setenv("COMP_CWORD", "2")
    result = run_command()
    assert "--top_k" in result.out and "--top_p" in result.out


def test_python_m_gpt2(small_folder: Path) -> None:
    result = subprocess.run([sys.executable, "-m", "gpt2", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == f"gpt2, version {gpt2.__version__}\n"


def test_pythons_collector_passes_by_what_a_command_has_loaded(small_folder: Path) -> None:
    gc.unfreeze()
    model, tokenizer, name = load_model_option(str(small_folder), device="cpu", dtype="float32")
    assert gc.get_freeze_count() > 1000 and gc.isenabled() and name == str(small_folder)
    assert model.config.vocab_size == tokenizer.vocab_size


def test_it_has_nothing_to_look_through_as_a_command_ends() -> None:
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 1000)); "  # called after main's own
    code += "from gpt2.cli import main; main(['--version'])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.endswith("\nTrue\n")
