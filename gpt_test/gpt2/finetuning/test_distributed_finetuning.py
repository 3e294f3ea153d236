"""Two processes that fine-tune compute what one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt_test.gpt2.training.test_distributed import finish, losses, start

SETTINGS = "--batch_size 4 --max_steps 4 --dropout 0 --sample_tokens 0 --precision float32 --device cpu --quiet"


@pytest.mark.parametrize(
    ("task", "options"),
    [("classification", ["--lora_rank", "2"]), pytest.param("instruction", ["--template", "plain"], marks=pytest.mark.slow)],
)
def test_two_processes_have_the_losses_of_one(small_folder: Path, tmp_path: Path, task: str, options: list[str]) -> None:
    data = tmp_path / "data.jsonl"
    words = ["cat", "small dog", "old", "sea by the boat", "fish"] * 6
    rows = [{"label": str(len(word) > 4), "text": word, "instruction": f"Say {word}.", "output": word} for word in words]
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--task", task, "--data", data, "--from_pretrained", small_folder, *SETTINGS.split()]
    runs = [start([*arguments, *options, "--out", tmp_path / name], n, "finetune") for name, n in (("one", 1), ("two", 2))]
    for run in runs:
        finish(run)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [line[:2] for line in one] == [line[:2] for line in two] and len(one) >= 6
    assert [line[2] for line in two] == pytest.approx([line[2] for line in one], rel=1e-4)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
