"""`gpt2 train --teacher`: the shape and start of the student, a resumed run, and options that have no meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.training.run_logs import read_metrics
from gpt2.weights.files import read_tensors

TINY = "--context 8 --batch_size 2 --eval_interval 2 --eval_batches 1 --log_interval 1 --checkpoint_interval 2"
QUIET = ["--sample_tokens", 0, "--quiet", "--workers", 1]


@pytest.fixture
def start(small_folder: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
    return ["train", "--data", tmp_path / "text.txt", "--teacher", small_folder, *TINY.split(), *QUIET, "--keep", "last"]


def test_a_student_has_half_of_the_layers_and_resumes(
    run_command: Callable, start: list[object], small_folder: Path, tmp_path: Path
) -> None:
    for name in ("whole", "broken"):
        result = run_command(*start, "--dropout", "0.1", "--max_steps", 4, "--out", tmp_path / name)
        assert result.status == 0 and "the student begins with the layers 0 of" in result.err, result.err
    model, teacher = GPT2.from_pretrained(tmp_path / "whole"), GPT2.from_pretrained(small_folder)
    assert (model.config.n_layer, model.config.n_embd) == (teacher.config.n_layer // 2, teacher.config.n_embd)
    (tmp_path / "broken" / "checkpoints" / "step-00000004.safetensors").unlink()
    result = run_command("train", "--resume", tmp_path / "broken", "--quiet")
    assert result.status == 0, result.err
    one, other = (read_tensors(tmp_path / name) for name in ("whole", "broken"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    losses = {name: [line.get("loss") for line in read_metrics(tmp_path / name)] for name in ("whole", "broken")}
    assert losses["whole"] == losses["broken"]


def test_the_teacher_and_its_share_change_the_loss(run_command: Callable, start: list[object], tmp_path: Path) -> None:
    first = []
    for name, options in enumerate(
        ([], ["--teacher_share", 0], ["--temperature_of_teacher", 1], ["--student_start", "random"])
    ):
        result = run_command(*start, *options, "--max_steps", 1, "--out", tmp_path / str(name))
        assert result.status == 0 and ("begins" in result.err) == ("random" not in options), result.err
        first.append(next(line["loss"] for line in read_metrics(tmp_path / str(name)) if "loss" in line))
    assert len(set(first)) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--n_embd", "9"], "--n_embd=9 is not that of the teacher, 24"),
        (["--engine", "numpy"], "--teacher is not supported by --engine numpy"),
        (["--temperature_of_teacher", "0"], "--temperature_of_teacher=0.0 must be above 0"),
        (["--teacher_share", "1.5"], "--teacher_share=1.5 must be at least 0 and at most 1"),
        (["--tokenizer", "gpt2", "--student_start", "random"], "the teacher has 300 token ids and the student 50257"),
        (["--tokenizer", "gpt2"], "the teacher has 300 token ids and the student 50257: use the teacher's tokenizer"),
        (
            ["--tokenizer", "char"],
            "the token 0 is b'!' for the teacher and b' ' for the student: use the teacher's tokenizer",
        ),
        (["--context", "4096"], "the student has 4096 positions and the teacher 40: use a context of at most 40"),
        (["--teacher", "nowhere"], "nowhere"),
    ],
)
def test_a_teacher_that_cannot_be(
    run_command: Callable, start: list[object], tmp_path: Path, options: list[str], words: str
) -> None:
    result = run_command(*start, *options, "--max_steps", 1, "--out", tmp_path / "run")
    assert result.status in (1, 2) and words in result.err, result.err
    assert "Traceback" not in result.err and not (tmp_path / "run" / "training.json").exists()
    without = [word for word in start if word != "--teacher"]
    without.remove(start[4])
    result = run_command(*without, "--teacher_share", "0.5", "--out", tmp_path / "run")
    assert result.status == 2 and "--teacher_share is for a --teacher: name one" in result.err
