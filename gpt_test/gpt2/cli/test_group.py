"""The `gpt2` command itself: help, version, completion, and the list of commands."""

from __future__ import annotations

import gc
import importlib
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import gpt2
from gpt2.cli.model_option import load_model_option

ROOT = Path(__file__).resolve().parents[3]


def test_help_and_version(run_command) -> None:
    for args in ([], ["--help"], ["-h"]):
        result = run_command(*args)
        assert result.status == 0 and "generate" in result.out and "tokenize" in result.out
    assert run_command("--version").out == f"gpt2, version {gpt2.__version__}\n"


def test_help_groups_the_commands_and_fits_80_columns(run_command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run_command("--help").out
    assert "..." not in text.replace("[ARGS]...", "") and max(map(len, text.splitlines())) <= 80
    sections = dict(re.findall(r"^(\w.*):\n((?:  .+\n?)+)", text, re.MULTILINE))
    commands = {heading: [line.split()[0] for line in lines.splitlines()] for heading, lines in sections.items()}
    assert commands["Train and fine-tune"] == ["data", "train", "finetune"] and commands["Generate"][0] == "generate"
    assert {"evaluate", "score", "benchmark"} <= set(commands["Measure"])
    assert {"tokenize", "quantize", "dequantize", "merge"} <= set(commands["Inspect and convert"])
    helps = [line.split(maxsplit=1)[1] for lines in sections.values() for line in lines.splitlines()]
    assert all(help_text.endswith(".") for help_text in helps), "one whole sentence per command"
    files = {path.stem for path in (ROOT / "gpt2" / "cli").glob("*.py")}
    del commands["Options"]
    assert {name for names in commands.values() for name in names} == {
        name.removesuffix("_") for name in files if is_command(name)
    }


def test_a_narrow_terminal_wraps_the_help_of_commands(run_command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    text = run_command("--help").out
    assert "..." not in text.replace("[ARGS]...", "") and max(map(len, text.splitlines())) <= 50


def is_command(name: str) -> bool:
    """Whether the module of that name in `gpt2.cli` has a command of the same name."""
    return isinstance(getattr(importlib.import_module(f"gpt2.cli.{name}"), name, None), click.Command)


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


def test_the_garbage_collector_skips_what_a_command_has_loaded(small_folder: Path) -> None:
    gc.unfreeze()
    model, tokenizer, name = load_model_option(str(small_folder), device="cpu", dtype="float32")
    assert gc.get_freeze_count() > 1000 and gc.isenabled() and name == str(small_folder)
    assert model.config.vocab_size == tokenizer.vocab_size


def test_the_garbage_collector_has_nothing_to_search_at_exit() -> None:
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 1000)); "  # runs after the handler of main
    )
    code += "from gpt2.cli import main; main(['--version'])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.endswith("\nTrue\n")
