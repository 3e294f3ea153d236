"""The commands of docs/fineweb.md are read by their parsers, because no test has the GPUs and the data that they need."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from gpt_test.page_blocks import read_blocks

PAGE = Path(__file__).resolve().parents[3] / "docs" / "fineweb.md"
_TORCHRUN = re.compile(r"torchrun (?:--\S+(?: \d+)? )+-m gpt2 ")


def test_every_command_has_the_options_of_its_parser(run_command: Callable) -> None:
    commands = [
        line
        for block in read_blocks(PAGE, "docs/fineweb.md")
        if block.language == "text"
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    assert len(commands) == 6
    for line in commands:
        words = shlex.split(_TORCHRUN.sub("gpt2 ", line))
        assert words[0] == "gpt2", line
        result = run_command(*words[1:], "--show_config")
        assert result.status == 0, f"{line}: {result.err}"
