"""Ctrl-C and SIGTERM during a benchmark: the temporary folder is removed, and finished measurements are shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="tests POSIX signals")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("last_words", ["", "lambda: 1 / 0", "lambda: os.kill(os.getpid(), 2)"])
def test_a_signal_leaves_no_temporary_folder(number: signal.Signals, last_words: str, tmp_path: Path) -> None:
    """Also if `last_words` raises an error, or another signal arrives during it."""
    code = (
        "import os\nfrom gpt2.benchmark.subject import temporary_folder\n"
        f"with temporary_folder({last_words}) as folder:\n"
        f"    print(folder, flush=True)\n    os.kill(os.getpid(), {int(number)})\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == (-signal.SIGINT if "kill" in last_words else -number) and result.stderr == ""
    assert str(tmp_path) in result.stdout and not list(tmp_path.iterdir())


# Runs the command once for each list of sections, each in a separate process, and prints the exit status of each. The
# processes are forks of one that has imported torch, because the import takes seconds. The standard output of the last one
# is closed.
FORKS = """
import os, sys
import gpt2.benchmark.training
from gpt2.benchmark.bench import Measure, Parts
from gpt2.benchmark.tokenizing import tokenizing
from gpt2.cli import main
from gpt2.cli.group import cli

folder, *arguments = sys.argv[1:]
parts = Parts(measures=[
    Measure(("tokenizer",), tokenizing),
    Measure(("training",), lambda bench: os.kill(os.getpid(), 2)),
])
cli.context_settings["obj"] = parts
cases = ["training", "tokenizer,training", "tokenizer,training"]
for case, sections in enumerate(cases):
    child = os.fork()
    if child == 0:
        reader, out = os.pipe()
        os.close(reader)
        if case < len(cases) - 1:
            out = os.open(f"{folder}/{case}.out", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(os.open(f"{folder}/{case}.err", os.O_WRONLY | os.O_CREAT), 2)
        main([*arguments, "--sections", sections])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_finished_measurements_are_shown_after_a_signal(small_folder: Path, tmp_path: Path) -> None:
    """The signal arrives in the second section. If it arrives in the first one, the command ends without output."""
    (tmp_path / "story.txt").write_text("the cat sat " * 20)
    options = [
        "--from_pretrained", small_folder, "--text", tmp_path / "story.txt", "--peers", "none", "--rounds", 1,
        "--train_context", 8, "--threads", 1,
    ]  # fmt: skip
    command = [sys.executable, "-c", FORKS, tmp_path, "benchmark", *options]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == [str(-signal.SIGINT)] * 3 and not result.stderr
    outs = [(tmp_path / f"{case}.out").read_text() for case in (0, 1)]
    errs = [(tmp_path / f"{case}.err").read_text() for case in (0, 1, 2)]
    assert not outs[0] and not any("Traceback" in err for err in errs)
    for shown in (outs[1], errs[2]):  # if the reader, such as `tee`, has ended, the results go to standard error
        values = json.loads(shown.splitlines()[-1])
        assert {row["section"] for row in values["rows"]} == {"tokenizer"}
        assert [item["reason"] for item in values["left_out"]] == ["stopped by a signal during a measurement"]
