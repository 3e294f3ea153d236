"""The warm `python` of the tests does what the real one does: output, exit status, folder, environment and input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="this system has the real python only")

HEAD = """import atexit, os, sys, threading, time
atexit.register(print, "at the end")
threading.Thread(target=lambda: (time.sleep(0.05), print("from a thread"))).start()
print(os.getcwd(), os.environ["WORD"], sys.argv[1:], sys.stdin.read(), __name__)
print("a message", file=sys.stderr)
"""


def run(python: Path | str, folder: Path, *arguments: object) -> tuple[str, str, int]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORD": "a word"}
    environment.pop("PYTHONUNBUFFERED", None)  # with which a killed process loses no output
    command = [str(python), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, input="some input", capture_output=True, text=True)
    return done.stdout, done.stderr, done.returncode


@pytest.mark.parametrize(
    "end", ["", "sys.exit()", "sys.exit(3)", "sys.exit('too bad')", "os._exit(5)", "os.kill(os.getpid(), 15)", "1 / 0"]
)
def test_a_script_ends_as_with_the_real_one(end: str, warm_commands: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(HEAD + end)
    found, expected = (
        run(python, tmp_path, "script.py", "an argument") for python in (warm_commands / "python", sys.executable)
    )
    if end == "1 / 0":  # the traceback of the fork also has the lines that started the script
        found, expected = ((out, err.splitlines()[-1], status) for out, err, status in (found, expected))
    status = 128 + 15 if expected[2] == -15 else expected[2]  # as a shell gives it
    assert found == (*expected[:2], status)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["generate", "Once upon a time", "--from_pretrained", "gpt2-tiny", "--max_tokens", "4"], 0),
        (["generate", "x", "--from_pretrained", "./no_folder"], 1),
        (["tokenize", "--no_such_option"], 2),
    ],
)
def test_a_command_prints_what_the_real_one_prints(
    arguments: list[str], status: int, warm_commands: Path, tmp_path: Path
) -> None:
    found, expected = (
        run(python, tmp_path, "-m", "gpt2", *arguments) for python in (warm_commands / "python", sys.executable)
    )
    assert found == expected and found[2] == status
