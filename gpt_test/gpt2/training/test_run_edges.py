"""The edges of a run: modes, 16 bits, NaN, odd files, a closed standard error, and long waits for another process."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.training import Trainer, TrainingData
from gpt2.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gpt2.training.progress import Progress, SteadyStream, plot_losses, read_metrics
from gpt_config import CheckpointError, ConfigError, GPT2Config, TrainingError
from gpt_test.gpt2.training import waiting, without_stderr
from gpt_test.gpt2.training.conftest import SIZES, tiny_config
from gpt_test.gpt2.training.forked import start_run
from gpt_test.gpt2.training.test_distributed import environment, finish, free_port

MakeTrainer = Callable[..., Trainer]


@pytest.mark.parametrize("is_training", [True, False])
def test_a_run_leaves_the_mode_and_does_not_depend_on_it(
    make_trainer: MakeTrainer, tmp_path: Path, is_training: bool
) -> None:
    expected = make_trainer(tmp_path / "expected", dropout=0.3, max_steps=3).train()
    trainer = make_trainer(tmp_path / "run", dropout=0.3, max_steps=3)
    trainer.model.train(is_training)
    trainer.model.h[1].eval()
    before = [part.training for part in trainer.model.modules()]
    assert dataclasses.asdict(trainer.train()) == dataclasses.asdict(expected)
    assert [part.training for part in trainer.model.modules()] == before
    with torch.no_grad():
        trainer.model.ln_f.bias.fill_(math.nan)
    with pytest.raises(TrainingError):
        trainer.train_step()
    assert [part.training for part in trainer.model.modules()] == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_refused_where_they_would_be_trained(
    char_data: TrainingData, tmp_path: Path, dtype: torch.dtype
) -> None:
    """A step of AdamW at this rate is smaller than the rounding of such weights."""
    model = GPT2(GPT2Config(vocab_size=char_data.train.vocab_size, **SIZES)).to(dtype)
    with pytest.raises(ConfigError, match=r"the model is in b?float16, .*: load it with dtype=float32"):
        Trainer(model, char_data, tiny_config(), tmp_path)
    model.requires_grad_(False)
    model.ln_f.float().requires_grad_()
    Trainer(model, char_data, tiny_config(), tmp_path)


def test_a_model_that_computes_nan_is_refused_before_the_first_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.ln_f.bias.fill_(math.nan)
    with pytest.raises(CheckpointError, match="the model computes NaN"):
        trainer.train()
    assert not (trainer.folder / "config.json").exists()


def test_a_validation_loss_of_nan_ends_the_run(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    measure = trainer.validation_loss
    trainer.validation_loss = lambda: math.nan if trainer.step else measure()  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the validation loss after step 4 is nan"):
        trainer.train()
    assert "NaN" not in (trainer.folder / "metrics.jsonl").read_text()


def test_odd_lines_of_metrics_are_left_out_and_doubled_ones_are_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install -r requirements-dev.txt)")
    good = [
        {"step": 0, "validation_loss": 2.0},
        {"step": 1, "loss": 1.5},
        {"step": 2, "loss": None},
        {"step": 2, "loss": 1.0},
    ]
    lines = [json.dumps(line).encode() for line in good]
    odd = [b"null", b"[]", b"{", b'{"step": null}', b'{"step": true}', b'{"step": "1"}', b"\xff\xfe", b'{"loss": 1}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*odd, lines[0], lines[0], *odd, *lines[1:], *odd]))
    assert read_metrics(tmp_path) == [good[0], good[0], *good[1:]]
    plot_losses(tmp_path)
    with Progress(tmp_path, 2, 4, is_quiet=True) as progress:
        progress.record({"step": 3, "loss": math.nan, "gradient_norm": math.inf})
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [good[0], good[1], good[3], {"step": 3, "loss": None, "gradient_norm": None}]


@pytest.mark.parametrize("values", [{"best_loss": math.nan}, {"best_loss": True}, {"best_step": 1.5}, {"n_since_best": -1}])
def test_odd_values_of_a_checkpoint_are_one_error(make_trainer: MakeTrainer, values: dict) -> None:
    trainer = make_trainer()
    trainer.save()
    checkpoint = load_checkpoint(trainer.folder / "checkpoints")
    save_checkpoint(trainer.folder / "checkpoints", Checkpoint(checkpoint.tensors, {**checkpoint.values, **values}))
    with pytest.raises(CheckpointError, match="is damaged"):
        trainer.load()


class _Gone:
    """A stream whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise OSError

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [None, _Gone()])
def test_a_stream_that_takes_nothing_is_no_error(stream: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady = SteadyStream(stream)  # type: ignore[arg-type]
    assert steady.write("text") == 4 and steady.isatty() == (stream is not None)
    steady.flush()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(tmp_path, 0, 2) as progress:
        progress.step(1.0, 10.0, None)
        progress.say("a line")
        progress.record({"step": 1, "loss": 1.0})
    assert len(read_metrics(tmp_path)) == 1


def test_a_run_without_standard_error_ends_well(text_file: Path, tmp_path: Path) -> None:
    settings = (
        "--tokenizer char --n_layer 1 --n_head 1 --n_embd 8 --context 8 --batch_size 2 --max_steps 2 --sample_tokens 0"
    )
    done = start_run(["train", "--data", text_file, "--out", tmp_path / "run", *settings.split()], without_stderr.__name__)
    _, err = done.communicate()
    assert done.returncode == 0 and not err
    assert [line["step"] for line in read_metrics(tmp_path / "run")][-1] == 2


def test_sighup_stays_ignored_under_nohup(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=3)
    batches = trainer.objective.batches

    def hang_up(step: int, *rest: int):
        os.kill(os.getpid(), signal.SIGHUP)
        return batches(step, *rest)

    trainer.objective.batches = hang_up  # type: ignore[assignment]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert trainer.train().signal is None
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.train().step == 3


def terminate_in_step(number: int, trainer: Trainer) -> None:
    """Let SIGTERM come during a step, counted from 1."""
    batches = trainer.objective.batches

    def terminate(step: int, *rest: int):
        if step == number - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(step, *rest)

    trainer.objective.batches = terminate  # type: ignore[assignment]


@pytest.mark.parametrize(("number", "after"), [(signal.SIGTERM, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_IGN)])
def test_a_second_signal_ends_the_run_at_once_but_not_a_second_sighup(
    make_trainer: MakeTrainer, number: int, after: signal.Handlers
) -> None:
    trainer, found = make_trainer(), []
    batches = trainer.objective.batches

    def receive(step: int, *rest: int):
        os.kill(os.getpid(), number)
        found.append(signal.getsignal(number))
        return batches(step, *rest)

    trainer.objective.batches = receive  # type: ignore[assignment]
    assert trainer.train().signal == number and found == [after]


def test_a_run_that_a_signal_stops_has_its_last_model(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(keep="last")
    terminate_in_step(3, trainer)
    assert trainer.train().step == 3  # without an evaluation
    saved = GPT2.from_pretrained(trainer.folder)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), trainer.model.parameters(), strict=True))


@pytest.mark.parametrize(("n_steps", "is_stopped"), [(4, False), (5, True)])
def test_a_signal_in_the_last_step_stops_nothing(make_trainer: MakeTrainer, n_steps: int, is_stopped: bool) -> None:
    trainer = make_trainer(max_steps=n_steps)
    terminate_in_step(4, trainer)
    stopped = trainer.train()
    assert (stopped.step, stopped.signal) == (4, signal.SIGTERM if is_stopped else None)
    assert (trainer.folder / "loss.png").exists() != is_stopped


def test_a_process_waits_for_work_longer_than_for_a_step() -> None:
    port = free_port()
    finish([start_run([], waiting.__name__, **environment(rank, 2, port)) for rank in range(2)])


def test_two_processes_share_nine_rows(small_folder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Name {n}.", "output": f"It is {n}."} for n in range(10)]
    (tmp_path / "ask.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["finetune", "--task", "instruction", "--data", tmp_path / "ask.jsonl", "--from_pretrained", small_folder]
    arguments += ["--device", "cpu", "--epochs", 1, "--sample_tokens", 0, "--quiet", "--precision", "float32"]
    port = free_port()
    finish([start_run([*arguments, "--out", tmp_path / "run"], **environment(rank, 2, port)) for rank in range(2)])
    assert (tmp_path / "run" / "model.safetensors").exists()
