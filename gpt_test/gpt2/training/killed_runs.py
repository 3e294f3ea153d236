"""Kill a run several times with SIGKILL and resume it, for tests that compare it with an unbroken run."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from safetensors.torch import load_file

from gpt_test.gpt2.training.forked import Run, start_run
from gpt_test.gpt2.training.test_distributed import losses


def newest_step(folder: Path) -> int:
    return max((int(path.name[5:13]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def run_with_kills(start: list[object], folder: Path, *, n_kills: int = 3) -> None:
    """Run the command `start` into `folder`. It is killed after each second new checkpoint, `n_kills` times, and resumed."""
    arguments, resume = [*start, "--out", folder], [start[0], "--resume", folder, "--quiet"]
    for _ in range(n_kills):
        process = start_run(arguments, is_measured=False)
        _kill_after_checkpoints(process, folder, newest_step(folder))
        arguments = resume
    process = start_run(arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def _kill_after_checkpoints(process: Run, folder: Path, before: int) -> None:
    seen, deadline = {before}, time.monotonic() + 120
    while len(seen) < 3:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it was killed"
        seen.add(newest_step(folder))
        time.sleep(0.003)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_same_results(found: Path, expected: Path, names: tuple[str, ...]) -> None:
    """The files of weights `names` are equal bit for bit, and so are the losses of all steps."""
    for name in names:
        one, other = load_file(expected / name), load_file(found / name)
        assert one.keys() == other.keys()
        assert all(tensor.equal(other[key]) for key, tensor in one.items()), name
    assert losses(found) == losses(expected)
