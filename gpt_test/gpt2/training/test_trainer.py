"""The training loop computes what a plain loop does, learns, resumes bit for bit, and loses nothing when it stops."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gpt2 import GPT2
from gpt2.training import Trainer, TrainingData, prepare
from gpt2.training.checkpoint import load_checkpoint
from gpt2.training.distributed import Processes
from gpt2.training.optimizer import learning_rate, make_optimizer
from gpt2.training.run_logs import read_metrics
from gpt2.training.trainer import parts_of_step
from gpt2.weights.tokenizer import load_tokenizer_for
from gpt_config import ConfigError, DataError, GPT2Config, TrainingError
from gpt_test.gpt2.training import small_disk
from gpt_test.gpt2.training.conftest import SIZES, tiny_config
from gpt_test.gpt2.training.forked import Run, start_run

MakeTrainer = Callable[..., Trainer]


@pytest.mark.parametrize("changes", [{"accumulation": 2}, {"batch_size": 512}])  # both are computed in two parts
def test_steps_equal_those_of_a_plain_loop(make_trainer: MakeTrainer, changes: dict) -> None:
    trainer = make_trainer(**changes, clip_norm=0.5, weight_decay=0.3)
    config, model = trainer.config, GPT2(trainer.model.config)
    model.load_state_dict(trainer.model.state_dict())
    decay = [p for name, p in model.named_parameters() if name.endswith("weight") and "ln_" not in name]
    others = [p for p in model.parameters() if not any(p is d for d in decay)]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2), foreach=False, fused=False,
    )  # fmt: skip
    for step in range(6):
        x, y = (torch.from_numpy(rows) for rows in trainer.objective.batches(step))
        loss = F.cross_entropy(model(x).transpose(1, 2), y)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        found_loss, found_norm = trainer.train_step()
        trainer.step += 1
        assert found_loss == pytest.approx(loss.item(), abs=1e-5)
        assert found_norm == pytest.approx(norm.item(), rel=1e-4)
    for (name, one), other in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=2e-5, msg=name)


def test_the_learning_rate_rises_and_falls() -> None:
    config = tiny_config(max_steps=100, warmup_steps=9, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:9] == pytest.approx([0.1 * (i + 1) for i in range(9)])
    assert rates[9] == 1.0 and rates[100] == 0.1
    assert rates[54] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 45 / 91)) / 2)
    assert all(a >= b for a, b in pairwise(rates[9:]))


def test_only_matrices_decay(small_model: GPT2) -> None:
    decayed, others = make_optimizer(small_model, tiny_config(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(small_model.parameters()))


def test_training_learns_and_writes_an_ordinary_model_folder(text_file: Path, tmp_path: Path) -> None:
    data = prepare([text_file], tmp_path / "data", tokenizer="bpe", vocab_size=270)
    torch.manual_seed(0)
    config = tiny_config(
        max_steps=60, learning_rate=1e-2, batch_size=8, eval_interval=20, sample_tokens=5, sample_prompt="the"
    )
    model = GPT2(GPT2Config(vocab_size=270, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    stopped = Trainer(model, data, config, tmp_path / "run", is_quiet=True).train()
    lines = read_metrics(tmp_path / "run")
    evaluations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 20, 40, 60]
    assert evaluations[0]["validation_loss"] == pytest.approx(math.log(270), abs=0.1)
    assert stopped.best_loss == min(line["validation_loss"] for line in evaluations) < 2.5
    assert all(line["sample"].startswith("the") for line in evaluations)
    expected_bits = evaluations[-1]["validation_loss"] / math.log(2) * len(data.validation) / data.validation.n_bytes
    assert evaluations[-1]["bits_per_byte"] == pytest.approx(expected_bits)
    loaded = GPT2.from_pretrained(tmp_path / "run")
    assert load_tokenizer_for(loaded).encode("the cat") == data.tokenizer.encode("the cat")
    trained = Trainer(loaded, data, config, tmp_path / "other", is_quiet=True)
    assert trained.validation_loss() == pytest.approx(stopped.best_loss, abs=1e-6)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install -r requirements-dev.txt)")
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "tokens", "accumulation", "parts"),
    [
        (64, 256, 1, 4), (64, 256, 8, 8), (16, 256, 1, 1), (12, 1024, 1, 3), (12, 1024, 2, 4), (17, 256, 1, 1),
        (5, 1024, 1, 5), (2, 5000, 1, 1), (512, 16, 1, 2),
    ],
)  # fmt: skip
def test_parts_on_a_cpu(rows: int, tokens: int, accumulation: int, parts: int) -> None:
    assert parts_of_step(rows, tokens, accumulation, torch.device("cpu")) == parts
    assert parts_of_step(rows, tokens, accumulation, torch.device("meta")) == accumulation


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulation": 2, "gradient_checkpointing": True}, {"optimizer": "muon", "ema": 0.9, "schedule": "wsd"}],
)
def test_a_continued_run_equals_an_uninterrupted_one(make_trainer: MakeTrainer, tmp_path: Path, changes: dict) -> None:
    uninterrupted = make_trainer(tmp_path / "uninterrupted", dropout=0.2, **changes)
    uninterrupted.train()
    first = make_trainer(tmp_path / "interrupted", dropout=0.2, **changes)
    batches = first.objective.batches

    def interrupted(step: int, *rest: int):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)  # the run stops after this step
        return batches(step, *rest)

    first.objective.batches = interrupted  # type: ignore[assignment]
    assert first.train().step == 7
    (tmp_path / "interrupted" / "checkpoints" / "step-00000007.safetensors").unlink()  # as if it had been killed
    second = make_trainer(tmp_path / "interrupted", dropout=0.2, **changes)
    second.load()
    assert second.step == 4
    torch.manual_seed(12345)  # the random state of the process must not matter
    second.train()
    for name, tensor in uninterrupted.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    kept = ("step", "loss", "validation_loss", "gradient_norm", "learning_rate")
    lines = [
        [{key: line[key] for key in kept if key in line} for line in read_metrics(tmp_path / name)]
        for name in ("uninterrupted", "interrupted")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 12 + 4
    assert first.best_loss >= second.best_loss == uninterrupted.best_loss


def test_each_step_draws_its_own_dropout(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(dropout=0.5, learning_rate=0.0, min_learning_rate=0.0)
    same_rows = trainer.objective.batches(0)
    trainer.objective.batches = lambda *_: same_rows  # type: ignore[assignment]
    losses = []
    for trainer.step in (0, 1, 0):
        losses.append(trainer.train_step()[0])
    assert losses[0] == losses[2] != losses[1]


def test_gradient_checkpointing_changes_nothing_but_memory(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for dropout in (0.0, 0.3):
        losses = [
            [make.train_step()[0] for make.step in range(3)]
            for make in (make_trainer(tmp_path, dropout=dropout, gradient_checkpointing=on) for on in (False, True))
        ]
        assert losses[0] == losses[1]


def test_bfloat16_is_near_float32(make_trainer: MakeTrainer) -> None:
    exact, rough = make_trainer().train_step()[0], make_trainer(precision="bfloat16").train_step()[0]
    assert exact != rough == pytest.approx(exact, rel=0.01)


def test_float16_scales_its_gradients(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(precision="float16")
    trainer.save()
    scaler = load_checkpoint(trainer.folder / "checkpoints").values["scaler"]  # empty where nothing is scaled
    assert scaler["scale"] > 1000
    before = trainer.model.wte.weight.clone()
    for trainer.step in range(3):
        loss, norm = trainer.train_step()
    assert math.isfinite(loss) and 0 < norm < 100
    assert not torch.equal(before, trainer.model.wte.weight)


def test_a_loss_of_nan_ends_the_run_and_the_state_before_it_is_saved(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    batches, poisoned = trainer.objective.batches, []

    def poison(step: int, *rest: int):
        if step == 6:
            poisoned.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
            with torch.no_grad():
                trainer.model.ln_f.bias.fill_(math.nan)
        return batches(step, *rest)

    trainer.objective.batches = poison  # type: ignore[assignment]
    with pytest.raises(TrainingError, match="the loss of step 6 is nan"):
        trainer.train()
    again = make_trainer(tmp_path / "run")
    again.load()
    assert again.step == 6
    for name, tensor in poisoned[0].items():
        if name != "ln_f.bias":
            assert torch.equal(again.model.state_dict()[name], tensor)


def test_settings_that_do_not_fit_are_refused_at_the_start(make_trainer: MakeTrainer, char_data: TrainingData) -> None:
    two = Processes(0, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match="context=17 is longer than the 16"):
        make_trainer(context=17)
    with pytest.raises(ConfigError, match="batch_size=6 cannot be divided among 2 processes with accumulation=2: choose"):
        Trainer(
            GPT2(GPT2Config(vocab_size=99, **SIZES)),
            char_data,
            tiny_config(batch_size=6, accumulation=2),
            "x",
            processes=two,
        )
    small = GPT2(GPT2Config(vocab_size=3, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ConfigError, match="token ids and the model 3"):
        Trainer(small, char_data, tiny_config(), "nowhere")
    with pytest.raises(DataError, match="too few"):
        short = dataclasses.replace(char_data.validation, tokens=char_data.validation.tokens[:1])
        make_trainer(data=dataclasses.replace(char_data, validation=short))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_run_after_the_step_and_saves_the_state(
    make_trainer: MakeTrainer, tmp_path: Path, number: int
) -> None:
    trainer = make_trainer(tmp_path / "run", max_steps=100_000, checkpoint_interval=100_000, eval_interval=100_000)
    handler = signal.getsignal(number)

    def kill_after_some_steps() -> None:
        """An earlier signal would end the tests. On a busy machine, a second is not enough for the first step."""
        while trainer.step < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=kill_after_some_steps, daemon=True).start()
    stopped = trainer.train()
    assert stopped.signal == number and stopped.step > 0 and signal.getsignal(number) == handler
    again = make_trainer(tmp_path / "run")
    again.load()
    assert again.step == stopped.step
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), trainer.model.parameters(), strict=True))


def start_long_run(folder: Path, data: Path) -> Run:
    settings = "--tokenizer char --n_layer 1 --n_head 1 --n_embd 64 --context 16 --batch_size 2 --sample_tokens 0 --quiet "
    settings += "--checkpoint_interval 1 --eval_interval 1000000 --max_steps 1000000"
    return start_run(["train", "--data", data, "--out", folder, *settings.split()], is_measured=False)


def wait_for(condition: Callable[[], bool], process: Run, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"the condition did not become true in {seconds} seconds"
        time.sleep(0.005)


def test_kill_at_any_moment_leaves_a_checkpoint_that_loads(text_file: Path, tmp_path: Path) -> None:
    """A checkpoint is written at every step, so most kills come in the middle of a save."""
    folder = tmp_path / "run"
    process = start_long_run(folder, text_file)
    checkpoints = folder / "checkpoints"
    wait_for(lambda: len(list(checkpoints.glob("step-*"))) >= 2, process)
    for moment in range(12):  # copies of the folder at some moments: what a kill would leave
        copy = tmp_path / f"copy{moment}"
        os.kill(process.pid, signal.SIGSTOP)
        shutil.copytree(checkpoints, copy)
        os.kill(process.pid, signal.SIGCONT)
        assert load_checkpoint(copy).values["step"] > 0
        time.sleep(0.011)
    process.kill()
    process.wait()
    before = load_checkpoint(checkpoints).values["step"]
    assert before > 0
    for line in read_metrics(folder):
        assert line["step"] >= 0
    again = start_run(["train", "--resume", folder, "--quiet"])
    wait_for(lambda: bool(list(checkpoints.glob("step-*"))) and load_newest(checkpoints) > before, again)
    again.terminate()
    _, err = again.communicate()
    assert again.returncode == 128 + signal.SIGTERM
    assert f"resume with --resume {folder}" in err and "Traceback" not in err


def load_newest(checkpoints: Path) -> int:
    return max((int(path.name[5:13]) for path in checkpoints.glob("step-*")), default=0)


def test_a_full_disk_is_a_one_line_error_and_the_last_checkpoint_remains(text_file: Path, tmp_path: Path) -> None:
    """A limit on the size of files, set after the second checkpoint, makes the kernel refuse the next one."""
    import resource

    folder = tmp_path / "run"
    process = start_long_run(folder, text_file)
    wait_for(lambda: len(list((folder / "checkpoints").glob("step-*"))) >= 2, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "cannot write" in err.splitlines()[-1] and "Traceback" not in err
    assert load_checkpoint(folder / "checkpoints").values["step"] > 0
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets users mount disks")
def test_a_really_full_disk_loses_nothing_and_with_room_the_run_continues(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    done = start_run([tmp_path / "disk", text_file], small_disk.__name__)
    _, err = done.communicate(timeout=120)
    if done.returncode == small_disk.REFUSED:
        pytest.skip("this system does not let users mount disks")
    full, whole = [line for line in err.splitlines() if line.startswith("status ")]
    assert full == "status 1: 2 checkpoints, 0 unfinished" and whole == "status 0: step-00000012.safetensors"
    assert "No space left" in err and "Traceback" not in err
    assert "error: cannot write" in err and "free disk space" in err


def test_an_incomplete_last_line_of_metrics_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_patience_ends_a_run_early_and_is_saved_with_it(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    changes = {"patience": 2, "eval_interval": 1, "learning_rate": 0.0, "min_learning_rate": 0.0}
    trainer = make_trainer(tmp_path / "run", **changes)
    stopped = trainer.train()
    assert stopped.is_early and stopped.step == 2 and stopped.signal is None
    resumed = make_trainer(tmp_path / "run", **changes)
    resumed.load()
    assert resumed.train() == stopped
    patient = make_trainer(tmp_path / "other", **changes | {"patience": 0}).train()
    assert patient.step == 12 and not patient.is_early
