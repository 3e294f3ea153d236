"""`gpt2 finetune --task preference`: it learns, resumes bit for bit with the reference of its start, and refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2.training.run_logs import read_metrics
from gpt2.weights.files import read_file


@pytest.fixture
def start(small_folder: Path, tmp_path: Path) -> list[object]:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {word}.", "chosen": word, "rejected": "no"} for word in ("cat", "dog", "sea", "fish") * 2]
    path.write_text("\n".join(map(json.dumps, rows)))
    options = "--batch_size 2 --epochs 2 --evaluations_per_epoch 2 --sample_tokens 0 --quiet --keep last --patience 0"
    names = ["--template", "plain", "--data", path, "--validation_data", path, "--from_pretrained", small_folder]
    return ["finetune", "--task", "preference", *names, "--learning_rate", "1e-3", *options.split()]


@pytest.mark.parametrize("lora", [[], ["--lora_rank", 2, "--lora_dropout", "0.1"]])
def test_a_run_learns_and_resumes(
    run_command: Callable,
    start: list[object],
    tmp_path: Path,
    lora: list[object],
) -> None:
    for name in ("whole", "broken"):
        result = run_command(*start, *lora, "--out", tmp_path / name)
        assert result.status == 0 and "8 training pairs" in result.err, result.err
    lines = [line for line in read_metrics(tmp_path / "whole") if "validation_loss" in line]
    assert lines[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(lines[0]["margin"]) < 1e-5
    assert lines[-1]["validation_loss"] < lines[0]["validation_loss"] - 0.01
    assert lines[-1]["margin"] > 0.02 and lines[-1]["accuracy"] > 0.8
    checkpoints = sorted((tmp_path / "broken" / "checkpoints").glob("*"))
    checkpoints[-1].unlink()
    before = (tmp_path / "broken" / "reference.safetensors").read_bytes()
    result = run_command("finetune", "--resume", tmp_path / "broken", "--quiet")
    assert result.status == 0 and "done: 8 steps" in result.err, result.err
    assert before == (tmp_path / "broken" / "reference.safetensors").read_bytes(), "it is of the model of the start"
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    found, expected = (read_file(tmp_path / name / file) for name in ("broken", "whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    losses = [[line.get("loss") for line in read_metrics(tmp_path / name)] for name in ("whole", "broken")]
    assert losses[0] == losses[1]


def test_what_a_preference_run_refuses(run_command: Callable, start: list[object], tmp_path: Path) -> None:
    for options, words in (
        (["--dropout", "0.1"], "--dropout is for --task text or classification or instruction"),
        (["--beta", "0"], "--beta=0.0 must be above 0"),
        (["--context", "3"], "0 training pairs and 0 validation pairs"),
        (["--task", "text", "--beta", "1"], "--beta is for --task preference"),
    ):
        result = run_command(*start, *options, "--out", tmp_path / "run")
        assert result.status in (1, 2) and words in result.err and result.err.count("\n") == 1, result.err
    assert run_command(*start, "--out", tmp_path / "run").status == 0
    result = run_command("finetune", "--resume", tmp_path / "run", "--data", start[6], "--epochs", 3, "--quiet")
    assert result.status == 0, "the same data is no change"
    (tmp_path / "other.jsonl").write_text(Path(str(start[6])).read_text() + "\n")
    result = run_command("finetune", "--resume", tmp_path / "run", "--data", tmp_path / "other.jsonl")
    assert result.status == 1 and "start a new run in another folder for other" in result.err
    (tmp_path / "run" / "reference.safetensors").write_bytes(b"broken")
    result = run_command("finetune", "--resume", tmp_path / "run", "--epochs", 4, "--quiet")
    assert result.status == 1 and "start a new run in another folder" in result.err and "Traceback" not in result.err
