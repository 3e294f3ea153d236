"""Progress: a bar on a terminal, lines of text in a file, and nothing from a quiet run."""

from __future__ import annotations

import ast
import contextlib
import os
import select
import sys
from pathlib import Path

import pytest

from gpt2 import GPT2
from gpt2.training import Trainer, TrainingData
from gpt2.training.progress import Progress
from gpt_config import GPT2Config
from gpt_test.gpt2.training.conftest import SIZES, tiny_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("is_quiet", [False, True])
def test_a_file_gets_lines_without_carriage_returns(char_data: TrainingData, tmp_path: Path, is_quiet: bool) -> None:
    model = GPT2(GPT2Config(vocab_size=char_data.train.vocab_size, **SIZES))
    with open(tmp_path / "log", "w", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        Trainer(model, char_data, tiny_config(), tmp_path / "run", is_quiet=is_quiet).train()
    log = (tmp_path / "log").read_bytes().decode()
    assert "\r" not in log
    starts = [line.split(":")[0] for line in log.splitlines() if "validation loss" in line]
    assert starts == ([] if is_quiet else ["step 0", "step 4", "step 8", "step 12"])
    assert bool(log) != is_quiet


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudoterminals")
def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    import termios

    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with open(theirs, "w", encoding="utf-8") as terminal, contextlib.redirect_stderr(terminal):
        with Progress(tmp_path, 0, 2) as progress:
            progress.step(1.25, 1000.0, 0.5)
            progress.say("a line")
            progress.step(1.0, 1000.0, 0.5)
        terminal.flush()
        shown = ""
        while "2/2" not in shown and select.select([ours], [], [], 10)[0]:  # a terminal may give its text in parts
            shown += os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "\r" in shown and "2/2 100%" in shown and "loss 1.000, 1,000 tokens/s, 50% of peak" in shown and "a line" in shown


def test_every_bar_is_for_notebooks_and_terminals_only() -> None:
    """tqdm.auto shows a widget in a notebook; with disable=None there is no bar if the stream is not a terminal."""
    n_bars = 0
    for path in [*(ROOT / "gpt2").rglob("*.py"), *(ROOT / "gpt_encoder").rglob("*.py"), ROOT / "generate.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tqdm"):
                assert node.module == "tqdm.auto", path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tqdm":
                n_bars += 1
                disable = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("disable", "")
                assert disable == "None" or disable.endswith(" or None"), f"{path}, line {node.lineno}"
    assert n_bars > 0
