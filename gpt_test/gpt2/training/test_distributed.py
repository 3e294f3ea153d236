"""Two processes on the CPU compute what one process does; if one is killed, the run ends with a one-line error."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2.training.run_logs import read_metrics
from gpt_test.gpt2.training.forked import Run, start_run

SETTINGS = (
    "--tokenizer char --n_layer 2 --n_head 2 --n_embd 16 --context 16 --batch_size 4 --max_steps 6 --warmup_steps 2 "
    "--log_interval 1 --eval_interval 3 --eval_batches 2 --checkpoint_interval 3 --sample_tokens 0 --precision float32 "
    "--device cpu --workers 1 --quiet"
)


def environment(rank: int = 0, world_size: int = 1, port: int = 0) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a process."""
    if world_size == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(arguments: list[object], world_size: int, name: str = "train") -> list[Run]:
    port = free_port()
    return [start_run([name, *arguments], **environment(rank, world_size, port)) for rank in range(world_size)]


def finish(processes: list[Run]) -> None:
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err


def losses(folder: Path) -> list[tuple[int, str, float]]:
    names = ("loss", "validation_loss", "gradient_norm")
    return [(line["step"], name, line[name]) for line in read_metrics(folder) for name in names if name in line]


@pytest.fixture(scope="module")
def single(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "run"
    finish(start(["--data", text_file, "--out", folder, *SETTINGS.split()], 1))
    return folder


@pytest.fixture(scope="module")
def shared(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs two processes with some options, once for each set of options. Tests that change the folder copy it first."""

    @functools.cache
    def run(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("shared") / "run"
        finish(start(["--data", text_file, "--out", folder, *SETTINGS.split(), *options], 2))
        return folder

    return run


@pytest.mark.parametrize("options", [[], ["--accumulation", "2"], ["--sharding", "fsdp"]])
def test_two_processes_equal_one(single: Path, shared: Callable[..., Path], options: list[str]) -> None:
    folder = shared(*options)
    for found, expected in zip(losses(folder), losses(single), strict=True):
        assert found[:2] == expected[:2]
        assert found[2] == pytest.approx(expected[2], abs=1e-5)
    one, other = load_file(single / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5, msg=name)


MUON = ["--optimizer", "muon", "--ema", "0.9", "--keep", "last"]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_with_muon_and_an_average_equal_one(
    text_file: Path, shared: Callable[..., Path], tmp_path: Path, sharding: str
) -> None:
    finish(start(["--data", text_file, "--out", tmp_path / "one", *SETTINGS.split(), *MUON], 1))
    folder = tmp_path / "two"
    shutil.copytree(shared(*MUON, "--sharding", sharding), folder)
    (folder / "checkpoints" / "step-00000006.safetensors").unlink()
    finish(start(["--resume", folder, "--quiet", "--device", "cpu"], 2))
    for found, expected in zip(losses(folder), losses(tmp_path / "one"), strict=True):
        assert found[:2] == expected[:2] and found[2] == pytest.approx(expected[2], abs=2e-5)
    for name in ("model.safetensors", "checkpoints/step-00000006.safetensors"):
        one, other = load_file(tmp_path / "one" / name), load_file(folder / name)
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=5e-5, msg=key)


@pytest.mark.parametrize("sharding", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_run_continues_with_another_number_of_processes(
    single: Path, shared: Callable[..., Path], tmp_path: Path, sharding: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(shared("--sharding", sharding), folder)
    (folder / "checkpoints" / "step-00000006.safetensors").unlink()
    if sharding == "fsdp":  # FSDP needs several processes
        stored = json.loads((folder / "training.json").read_text())
        (folder / "training.json").write_text(json.dumps({**stored, "sharding": "ddp"}))
    finish(start(["--resume", folder, "--quiet", "--device", "cpu"], 1))
    for found, expected in zip(losses(folder), losses(single), strict=True):
        assert found[2] == pytest.approx(expected[2], abs=1e-5)


def test_a_killed_process_ends_the_run_with_a_one_line_error(text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["--data", text_file, "--out", folder, *SETTINGS.split(), "--max_steps", "1000000"]
    first, second = start(arguments, 2)
    deadline = time.monotonic() + 300
    while not (folder / "checkpoints").exists():
        assert first.poll() is None and second.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    _, err = first.communicate(timeout=300)
    assert first.returncode == 1
    assert "process 0 of 2 lost the connection to another process" in err and "--resume" in err and "Traceback" not in err


def test_fsdp_with_one_process_and_uneven_batches_are_refused(text_file: Path, tmp_path: Path) -> None:
    arguments = ["--data", text_file, *SETTINGS.split(), "--out"]
    single = start([*arguments, tmp_path / "single", "--sharding", "fsdp"], 1)
    uneven = start([*arguments, tmp_path / "uneven", "--batch_size", "5"], 2)
    for processes, words in (
        (single, "there is one: start the run with torchrun"),
        (uneven, "batch_size=5 cannot be divided among 2 processes with accumulation=1"),
    ):
        for process in processes:
            _, err = process.communicate(timeout=300)
            assert process.returncode == 1 and words in err and "Traceback" not in err, err


def test_a_signal_to_one_process_stops_all_and_saves_the_state(text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, second = start(["--data", text_file, "--out", folder, *SETTINGS.split(), "--max_steps", "1000000"], 2)
    deadline = time.monotonic() + 300
    while not (folder / "checkpoints").exists():
        assert first.poll() is None and second.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    second.terminate()
    for process in (first, second):
        _, err = process.communicate(timeout=300)
        assert "Traceback" not in err, err
    assert second.returncode == 128 + signal.SIGTERM
    steps = [line["step"] for line in read_metrics(folder)]
    assert (folder / "checkpoints" / f"step-{steps[-1]:08}.safetensors").exists()
