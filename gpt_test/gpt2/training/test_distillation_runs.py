"""Whole runs with a teacher: two processes compute what one does, and a killed run ends like an unbroken one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt_test.conftest import TRAINING_TEXT
from gpt_test.gpt2.training.forked import start_run
from gpt_test.gpt2.training.killed_runs import assert_same_results, run_with_kills
from gpt_test.gpt2.training.test_distributed import finish, losses, start

pytestmark = pytest.mark.slow

SETTINGS = (
    "--context 16 --batch_size 4 --warmup_steps 2 --log_interval 1 --eval_interval 3 --eval_batches 2 --sample_tokens 0 "
    "--precision float32 --device cpu --workers 1 --quiet --keep last"
)


@pytest.fixture
def common(small_folder: Path, tmp_path: Path) -> list[object]:
    text = tmp_path / "text.txt"
    text.write_text(TRAINING_TEXT * 8)
    return ["--data", text, "--teacher", small_folder, *SETTINGS.split()]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_equal_one(common: list[object], tmp_path: Path, sharding: str) -> None:
    """FSDP shards the student; each process has the whole teacher."""
    for name, n, options in (("one", 1, []), ("two", 2, ["--accumulation", 2, "--sharding", sharding])):
        finish(start([*common, "--max_steps", 6, *options, "--out", tmp_path / name], n))
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert [line[:2] for line in found] == [line[:2] for line in expected] and len(found) >= 14
    assert [line[2] for line in found] == pytest.approx([line[2] for line in expected], abs=1e-5)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, tensor in one.items():
        pair = other[key], tensor
        if key.endswith("c_attn.bias"):  # that of keys changes no probability, so its gradient is rounding alone
            pair = tuple(torch.cat([queries, values]) for queries, _, values in (each.chunk(3) for each in pair))
        torch.testing.assert_close(*pair, rtol=0, atol=1e-5, msg=key)


def test_a_killed_run_equals_an_unbroken_one(common: list[object], tmp_path: Path) -> None:
    first = ["train", *common, "--max_steps", 400, "--checkpoint_interval", 7, "--dropout", "0.1"]
    finish([start_run([*first, "--out", tmp_path / "whole"])])
    run_with_kills(first, tmp_path / "killed")
    names = ("model.safetensors", "checkpoints/step-00000400.safetensors")
    assert_same_results(tmp_path / "killed", tmp_path / "whole", names)
