"""Standard output and error that are closed, full, or in an encoding that lacks characters, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a POSIX shell and /dev/full")


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    command = line.replace("GPT2", f"{sys.executable} -m gpt2")
    return subprocess.run(["bash", "-c", command], capture_output=True, cwd=ROOT, env={**os.environ, **environment})


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2> >(true)"])
def test_messages_that_cannot_be_written_never_cost_the_text(redirection: str) -> None:
    """tokenize writes to both streams."""
    result = shell(f"GPT2 tokenize Once --model_name gpt2 {redirection}")
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 1)


def test_an_error_that_cannot_be_written_keeps_its_status() -> None:
    assert shell("GPT2 tokenize 2>/dev/full").returncode == 2


def test_a_full_stdout_is_one_line() -> None:
    result = shell("GPT2 tokenize Once --model_name gpt2 >/dev/full")
    assert result.returncode == 1 and result.stderr.splitlines() == [b"error: No space left on device"]


def test_a_redirected_encoding_without_the_character_is_utf_8_with_one_warning() -> None:
    encoding = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    text = shell("GPT2 tokenize 'の' --model_name gpt2", PYTHONUTF8="1").stdout
    result = shell("GPT2 tokenize 'の' --model_name gpt2", **encoding)
    assert result.stdout == text and "の" in text.decode()
    assert [line[:31] for line in result.stderr.splitlines() if line.startswith(b"warning")] == [
        b"warning: the output is UTF-8, b"
    ]
    assert b"warning" not in shell("GPT2 tokenize Once --model_name gpt2", **encoding).stderr
