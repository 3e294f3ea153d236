"""Whole runs of preference tuning: two processes compute what one does, and a killed run ends like an unbroken one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt2.training.run_logs import read_metrics
from gpt_test.gpt2.training.forked import start_run
from gpt_test.gpt2.training.killed_runs import assert_same_results, newest_step, run_with_kills
from gpt_test.gpt2.training.test_distributed import finish, losses, start

pytestmark = pytest.mark.slow

SETTINGS = (
    "--batch_size 4 --learning_rate 1e-3 --template plain --sample_tokens 0 --precision float32 --device cpu --quiet "
    "--keep last --patience 0"
)


@pytest.fixture
def common(small_folder: Path, tmp_path: Path) -> list[object]:
    data = tmp_path / "pairs.jsonl"
    words = ("cat", "small dog", "old", "sea by the boat", "fish") * 3  # 15 pairs: the last batch has fewer
    rows = [{"prompt": f"Say {word}.", "chosen": word, "rejected": "no, no"} for word in words]
    data.write_text("\n".join(map(json.dumps, rows)))
    files = ["--data", data, "--validation_data", data, "--from_pretrained", small_folder]
    return ["--task", "preference", *files, *SETTINGS.split()]


def figures(folder: Path) -> list[float]:
    return [line[name] for line in read_metrics(folder) for name in ("accuracy", "margin") if name in line]


def test_two_processes_equal_one(common: list[object], tmp_path: Path) -> None:
    """The first process measures the reference for both. Accuracy and margin are of all pairs, in each process."""
    for name, n in (("one", 1), ("two", 2)):
        options = ["--max_steps", 6, "--evaluations_per_epoch", 4]
        finish(start([*common, *options, "--out", tmp_path / name], n, "finetune"))
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert [line[:2] for line in found] == [line[:2] for line in expected] and len(found) >= 14
    assert [line[2] for line in found] == pytest.approx([line[2] for line in expected], abs=1e-5)
    assert figures(tmp_path / "two") == pytest.approx(figures(tmp_path / "one"), abs=1e-5)
    assert figures(tmp_path / "two")[-2] > 0.8


@pytest.mark.parametrize("lora", [[], ["--lora_rank", 2, "--lora_dropout", "0.1"]])
def test_a_killed_run_equals_an_unbroken_one(common: list[object], tmp_path: Path, lora: list[object]) -> None:
    first = ["finetune", *common, *lora, "--epochs", 100, "--evaluations_per_epoch", 1]
    finish([start_run([*first, "--out", tmp_path / "whole"])])
    run_with_kills(first, tmp_path / "killed")
    last = f"checkpoints/step-{newest_step(tmp_path / 'whole'):08}.safetensors"
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert_same_results(tmp_path / "killed", tmp_path / "whole", (weights, last, "reference.safetensors"))
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
