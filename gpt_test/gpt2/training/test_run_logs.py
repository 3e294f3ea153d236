"""The logs of a run: each gets all metrics, one that fails costs no step, and a resumed run goes on at Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gpt2 import GPT2
from gpt2.training import Trainer, TrainingData
from gpt2.training.run_logs import open_logs, read_metrics
from gpt_config import ConfigError, GPT2Config, GPT2Warning, InputError
from gpt_test.gpt2.training.conftest import SIZES, tiny_config


class Kept:
    """A log that keeps what it gets, and fails at step `fails_at` and, if that is below 0, as it is closed."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.fails_at, self.n_closed = fails_at, 0

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if step == self.fails_at:
            raise OSError("no space\nis left")
        self.lines.append({"step": step, **values})

    def close(self) -> None:
        self.n_closed += 1
        if self.fails_at is not None and self.fails_at < 0:
            raise RuntimeError


@pytest.fixture
def trainer(char_data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    monkeypatch.setattr("gpt2.training.loop.plot_losses", lambda folder: None)  # it takes longer than these runs

    def make(*logs: object, max_steps: int = 4) -> Trainer:
        model = GPT2(GPT2Config(vocab_size=char_data.train.vocab_size, **SIZES))
        config = tiny_config(max_steps=max_steps, warmup_steps=0, eval_interval=2, checkpoint_interval=2, eval_batches=1)
        return Trainer(model, char_data, config, tmp_path / "run", is_quiet=True, logs=logs)

    return make


def test_each_log_gets_all_metrics_and_one_that_fails_costs_no_step(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    kept, broken, odd = Kept(), Kept(fails_at=2), Kept(fails_at=-1)
    with pytest.warns(GPT2Warning) as found:
        assert trainer(broken, kept, odd, "jsonl").train().step == 4
    said = [str(warning.message) for warning in found if warning.category is GPT2Warning]
    assert [line.split("(")[1].split(")")[0] for line in said] == ["no space is left", "RuntimeError"]
    assert all(line.startswith("the log Kept has failed") and "the run goes on without it" in line for line in said)
    assert kept.lines == odd.lines == read_metrics(tmp_path / "run") and len(kept.lines) == 7 and len(broken.lines) == 2
    assert [log.n_closed for log in (kept, broken, odd)] == [1, 1, 1]


def test_a_wrong_log_is_named_before_the_run(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"log='mlflow' must be one of jsonl, tensorboard, wandb"):
        trainer("mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"needs the package wandb, which is not installed: pip install '\.\[wandb\]'"):
        trainer("wandb")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Replace the package wandb. Returns its runs, each with `options`, `lines` and the `exit_codes` of its ends."""
    runs: list[SimpleNamespace] = []

    def init(**options: Any) -> SimpleNamespace:
        run = SimpleNamespace(options=options, lines=[], exit_codes=[], define_metric=lambda *_, **__: None)
        run.log, run.finish = run.lines.append, lambda exit_code=None: run.exit_codes.append(exit_code)
        runs.append(run)
        return run

    module = ModuleType("wandb")
    module.__dict__.update(init=init, Settings=SimpleNamespace, __spec__=importlib.util.spec_from_loader("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_NAME", raising=False)
    return runs


def test_a_resumed_run_has_the_same_id(
    trainer: Callable[..., Trainer], stand_in: list[SimpleNamespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer("wandb", max_steps=2).train()
    monkeypatch.setenv("WANDB_NAME", "mine")
    again = trainer("wandb", "wandb")
    again.load()
    again.train()
    first, second = stand_in
    assert first.options["id"] == second.options["id"] == json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    assert first.options["name"] == "run" and "name" not in second.options and first.options["resume"] == "allow"
    assert first.options["config"]["max_steps"] == 2 and first.options["config"]["model"]["n_layer"] == 2
    assert [line["step"] for line in first.lines + second.lines] == [0, 1, 2, 2, 3, 4, 4]
    assert first.lines + second.lines == read_metrics(tmp_path / "run") and first.exit_codes == second.exit_codes == [0]


def test_an_error_marks_the_run_as_failed(
    trainer: Callable[..., Trainer], stand_in: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At Weights & Biases, a run with an exit code other than 0 is "failed", not "finished". A log needs no method fail."""
    kept = Kept()
    broken = trainer("wandb", kept)
    monkeypatch.setattr(broken, "train_step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.train()
    [run] = stand_in
    assert run.exit_codes == [1] and [line["step"] for line in run.lines] == [0] and kept.n_closed == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"id": 3}'])
def test_a_damaged_id_begins_a_new_run(stand_in: list[SimpleNamespace], tmp_path: Path, content: str) -> None:
    (tmp_path / "wandb.json").write_text(content)
    open_logs(["wandb"], tmp_path, 0, is_measured=True, about={})
    assert len(stand_in[0].options["id"]) == 16


def test_a_log_that_cannot_be_opened_costs_nothing(
    stand_in: list[SimpleNamespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.warns(GPT2Warning, match=r"the log wandb has failed \(not logged in\)"):
        logs = open_logs(["wandb"], tmp_path, 0, is_measured=True, about={})
    for log in logs:
        log.log(1, {"loss": 2.0})
        log.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def records_of(file: Path) -> Iterator[bytes]:
    """The records of a file of wandb: 7 bytes, then LevelDB's log, blocks of 32 KiB whose records have a head of 7 bytes."""
    content, parts, place = file.read_bytes(), b"", 7
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # the rest of a block, in which no head fits
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_weights_and_biases_offline(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The package itself, without a network: parts of a run with one id, all metrics in its files, a silent terminal."""
    pytest.importorskip("wandb", reason="wandb is not installed (pip install '.[wandb]')")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings.catch_warnings():
        warnings.simplefilter("error", GPT2Warning)
        trainer("wandb", max_steps=2).train()
        again = trainer("wandb")
        again.load()
        again.train()
        broken = trainer("wandb", max_steps=5)
        broken.load()
        monkeypatch.setattr(broken, "train_step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            broken.train()
    run_id = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    lines, exit_codes = [], []
    for content in (content for file in files for content in records_of(file)):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if record.HasField("exit"):
            exit_codes.append(record.exit.exit_code)
        if items:
            lines.append({name: value for name, value in items.items() if not name.startswith("_")})
    assert exit_codes == [0, 0, 1] and lines == read_metrics(tmp_path / "run")
    assert capfd.readouterr() == ("", "")
