"""Scores of tasks on several processes: the first one computes them, also if each has only a part of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt2.training.run_logs import read_metrics
from gpt_test.gpt2.training.test_distributed import SETTINGS, finish, start


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--sharding", "fsdp"], ["--sharding", "fsdp", "--ema", "0.9"]])
def test_two_processes_have_the_figures_of_one(text_file: Path, tmp_path: Path, options: list[str]) -> None:
    items = [{"text": f"the {animal} saw a hen.\n the owl fed a fish."} for animal in ("cat", "dog", "owl")]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    settings = [*SETTINGS.split(), "--context", "64", "--eval_tasks", f"lambada={tmp_path / 'items.jsonl'}"]
    found = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        own = [option for option in options if world_size == 2 or option not in ("--sharding", "fsdp")]
        finish(start(["--data", text_file, "--out", folder, *settings, *own], world_size))
        lines = [line for line in read_metrics(folder) if "validation_loss" in line]
        found.append([(line["step"], line["lambada_accuracy"], line["lambada_perplexity"]) for line in lines])
    assert [step for step, _, _ in found[0]] == [0, 3, 6] and len({perplexity for *_, perplexity in found[0]}) == 3
    for one, two in zip(*found, strict=True):
        assert one == pytest.approx(two, rel=1e-3)
