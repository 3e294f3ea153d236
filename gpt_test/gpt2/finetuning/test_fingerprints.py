"""The fingerprint of a run says whether it is resumed with the same data."""

from __future__ import annotations

import json
from pathlib import Path

from gpt2.finetuning.run import prepare_finetuning
from gpt_config import FinetuningConfig

SMALL = {"max_steps": 1, "sample_tokens": 0, "batch_size": 2}


def test_each_file_of_a_classification_counts(small_folder: Path, tmp_path: Path) -> None:
    content = "label,text\n" + "cat,a cat\ndog,a dog\n" * 10
    files = {name: tmp_path / f"{name}.csv" for name in ("training", "validation", "test")}
    config = FinetuningConfig(task="classification", **SMALL)
    fingerprints = set()
    for changed in (None, *files):
        for name, path in files.items():
            path.write_text(content + "dog,changed\n" * (name == changed))
        others = {f"{name}_data": [files[name]] for name in ("validation", "test")}
        run = prepare_finetuning(small_folder, [files["training"]], config, tmp_path / "run", is_quiet=True, **others)
        fingerprints.add(run.fingerprint)
    assert len(fingerprints) == 4


def test_the_template_of_instructions_counts(small_folder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Name {n}.", "output": f"It is {n}."} for n in range(10)]
    (tmp_path / "ask.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.json").write_text('{"response": "Answer:"}')
    fingerprints = set()
    for template in ("plain", str(tmp_path / "own.json"), "plain"):
        config = FinetuningConfig(task="instruction", template=template, **SMALL)
        run = prepare_finetuning(small_folder, [tmp_path / "ask.jsonl"], config, tmp_path / "run", is_quiet=True)
        fingerprints.add(run.fingerprint)
    assert len(fingerprints) == 2
