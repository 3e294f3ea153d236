"""A run goes on with more steps, another schedule or other data, in any folder, and says what has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.training.checkpoint import load_checkpoint
from gpt2.training.run_logs import read_metrics
from gpt2.weights.files import read_tensors

_TINY = (
    "--tokenizer char --n_layer 1 --n_head 1 --n_embd 8 --context 8 --batch_size 2 --eval_interval 2 --eval_batches 1 "
    "--log_interval 1 --checkpoint_interval 2 --sample_tokens 0 --quiet --workers 1"
)
TINY = _TINY.split()
FLAT = ["--learning_rate", "1e-3", "--min_learning_rate", "1e-3", "--warmup_steps", "0"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question. " * 20)
    return path


@pytest.fixture
def ask(tmp_path: Path) -> Path:
    path = tmp_path / "ask.jsonl"
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("cat", "dog", "sea", "fish", "boat") * 3]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def same_weights(one: Path, other: Path) -> bool:
    a, b = read_tensors(one), read_tensors(other)
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_more_steps_are_those_of_a_longer_run(run_command: Callable, text: Path, tmp_path: Path) -> None:
    long, short = tmp_path / "long", tmp_path / "short"
    start = ["train", "--data", text, *TINY, *FLAT, "--keep", "last"]
    assert run_command(*start, "--max_steps", 6, "--out", long).status == 0
    assert run_command(*start, "--max_steps", 4, "--out", short).status == 0
    result = run_command("train", "--resume", short, "--max_steps", 6, "--batch_size", 2)
    assert result.status == 0 and "done: 6 steps" in result.err, result.err
    assert "resumed at step 4: --max_steps was 4, is now 6" in result.err and "measured again" not in result.err
    assert same_weights(long, short)
    stored = json.loads((short / "training.json").read_text())
    assert stored["max_steps"] == 6 and stored["changes"] == [{"step": 4, "max_steps": [4, 6]}]
    steps = [(line["step"], "loss" in line) for line in read_metrics(short)]
    assert steps == [(line["step"], "loss" in line) for line in read_metrics(long)] and len(steps) == len(set(steps)) == 10
    result = run_command("train", "--resume", short, "--learning_rate", "5e-4", "--max_steps", 7)
    assert result.status == 2 and "--min_learning_rate=0.001 is above learning_rate=0.0005" in result.err
    rates = ["--learning_rate", "5e-4", "--min_learning_rate", "5e-4"]
    assert run_command("train", "--resume", short, *rates, "--max_steps", 7).status == 0
    assert read_metrics(short)[-2]["learning_rate"] == 5e-4
    changes = json.loads((short / "training.json").read_text())["changes"]
    assert changes[1] == {
        "step": 6,
        "max_steps": [6, 7],
        "learning_rate": [1e-3, 5e-4],
        "min_learning_rate": [1e-3, 5e-4],
    }


def test_a_stable_run_goes_on_and_decays_like_one_planned_so(run_command: Callable, text: Path, tmp_path: Path) -> None:
    whole, stable = tmp_path / "whole", tmp_path / "stable"
    start = ["train", "--data", text, *TINY, "--warmup_steps", 1, "--schedule", "wsd", "--keep", "last"]
    assert run_command(*start, "--max_steps", 8, "--decay_steps", 4, "--out", whole).status == 0
    assert run_command(*start, "--max_steps", 4, "--decay_steps", 0, "--out", stable).status == 0
    result = run_command("train", "--resume", stable, "--max_steps", 8, "--decay_steps", 4)
    assert result.status == 0 and "--decay_steps was 0, is now 4" in result.err, result.err
    assert same_weights(whole, stable)
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(stable) if "loss" in line}
    assert [rates[step] for step in (2, 5)] == [1e-3, 1e-3] and 1e-4 < rates[8] < rates[7] < rates[6] < 1e-3


def test_another_schedule_in_a_run_of_an_older_version(run_command: Callable, text: Path, tmp_path: Path) -> None:
    folder, new = tmp_path / "run", ("schedule", "min_learning_rate_share", "decay_steps", "decay_shape")
    assert run_command("train", "--data", text, *TINY, *FLAT, "--max_steps", 2, "--out", folder).status == 0
    stored = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps({name: stored[name] for name in stored if name not in new}))
    result = run_command("train", "--resume", folder, "--max_steps", 6, "--schedule", "linear")
    assert result.status == 0 and "--schedule was cosine, is now linear" in result.err, result.err
    result = run_command("train", "--resume", folder, "--max_steps", 8, "--min_learning_rate_share", "0.25")
    assert result.status == 0, result.err
    stored = json.loads((folder / "training.json").read_text())
    assert (stored["min_learning_rate"], stored["min_learning_rate_share"]) == (None, 0.25)
    assert read_metrics(folder)[-2]["learning_rate"] == pytest.approx(1e-3 * (0.25 + 0.75 / 8), rel=1e-12)


def test_other_data_is_measured_again(run_command: Callable, text: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "run", tmp_path / "other.txt"
    assert run_command("train", "--data", text, *TINY, *FLAT, "--max_steps", 4, "--out", folder).status == 0
    before = (folder / "training.json").read_bytes(), (folder / "data" / "train.bin").read_bytes()
    other.write_text("A text with a letter that the run has not seen: Z. " * 20)
    result = run_command("train", "--resume", folder, "--data", other, "--max_steps", 6)
    assert result.status == 1 and result.err.count("\n") == 1
    assert before == ((folder / "training.json").read_bytes(), (folder / "data" / "train.bin").read_bytes())
    other.write_text("that question is not the question to be. " * 20)
    result = run_command("train", "--resume", folder, "--data", other, "--max_steps", 6)
    assert result.status == 0 and f"--data was {text}, is now {other}" in result.err and "measured again" in result.err
    evaluations = [(line["step"], line["validation_loss"]) for line in read_metrics(folder) if "validation_loss" in line]
    assert [step for step, _ in evaluations] == [0, 2, 4, 6]
    best = min(loss for step, loss in evaluations if step >= 4)
    assert f"best validation loss {best:.4f}" in result.err
    stored = json.loads((folder / "training.json").read_text())
    assert stored["data"] == [str(other)] and stored["data_fingerprint"] != json.loads(before[0])["data_fingerprint"]
    (folder / "checkpoints" / "step-00000006.safetensors").unlink()
    assert run_command("train", "--resume", folder).status == 0


def test_the_best_model_of_dropped_steps_is_replaced(run_command: Callable, text: Path, tmp_path: Path) -> None:
    """The run falls until step 6. From step 4 on, another rate makes it worse, so step 4 is the best of the new line."""
    folder, rates = tmp_path / "run", ["--learning_rate", "1e-2", "--min_learning_rate", "1e-2", "--warmup_steps", "0"]
    start = ["train", "--data", text, *TINY, *rates, "--max_steps", 6, "--out", folder]
    assert run_command(*start).status == 0
    worse = ["--learning_rate", 9, "--min_learning_rate", 9]
    result = run_command("train", "--resume", folder, "--step", 4, *worse)
    assert result.status == 0 and "the best model was that of step 6, which is dropped" in result.err, result.err
    losses = {line["step"]: line["validation_loss"] for line in read_metrics(folder) if "validation_loss" in line}
    assert losses[4] < losses[6] and f"best validation loss {losses[4]:.4f}" in result.err
    checkpoint = load_checkpoint(folder / "checkpoints", 4).tensors
    for name, tensor in GPT2.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, checkpoint[f"model.model.{name}"]), name
    result = run_command("train", "--resume", folder, "--step", 4)
    assert result.status == 0 and "which is dropped" not in result.err, "no later step was better"


@pytest.mark.parametrize(
    "task",
    ["train", "lora", *(pytest.param(task, marks=pytest.mark.slow) for task in ("text", "instruction", "classifier"))],
)
def test_a_run_goes_on_elsewhere_without_its_base(
    run_command: Callable,
    text: Path,
    ask: Path,
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_folder, "base")
    if task == "train":
        start = ["train", "--data", text.name, "--init_from", "./base", *TINY[8:], "--dropout", "0.1", "--max_steps", 4]
    else:
        data = text if task == "text" else ask
        kind = {"lora": "instruction", "classifier": "classification"}.get(task, task)
        start = ["finetune", "--task", kind, "--data", data.name, *QUIET]
        start += ["--from_pretrained", "./base", "--max_steps", 4, "--batch_size", 3]
        start += ["--lora_rank", 2, "--lora_dropout", "0.1"] if task in ("lora", "classifier") else []
        start += ["--text_column", "instruction", "--label_column", "output"] if task == "classifier" else []
    for name in ("whole", "broken"):
        assert run_command(*start, "--keep", "last", "--out", name).status == 0
    for path in Path("broken/checkpoints").glob("step-00000004*"):
        path.unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "base")
    result = run_command(start[0], "--resume", "../broken", "--quiet")
    assert result.status == 0 and "done: 4 steps" in result.err, result.err
    for path in (tmp_path / "whole").iterdir():
        if path.is_file() and path.suffix not in (".jsonl", ".png"):
            found, expected = (tmp_path / "broken" / path.name).read_bytes(), path.read_bytes()
            is_same = json.loads(found) == json.loads(expected) if path.suffix == ".json" else found == expected
            assert is_same, path.name


QUIET = ["--quiet", "--sample_tokens", 0]


def test_a_classifier_goes_on_with_its_labels_only(run_command: Callable, small_folder: Path, tmp_path: Path) -> None:
    def table(name: str, *labels: str) -> Path:
        path = tmp_path / name
        path.write_text(
            "label,text\n" + "".join(f"{label},a small {label} number {n}\n" for n in range(12) for label in labels)
        )
        return path

    folder = tmp_path / "run"
    start = ["finetune", "--task", "classification", "--data", table("a.csv", "cat", "dog"), "--out", folder, *QUIET]
    assert run_command(*start, "--from_pretrained", small_folder, "--max_steps", 2).status == 0
    assert json.loads((folder / "finetuning.json").read_text())["labels"] == ["cat", "dog"]
    resume = ["finetune", "--resume", folder, "--quiet", "--max_steps", 4, "--data"]
    result = run_command(*resume, table("b.csv", "cat", "owl"))
    assert result.status == 1 and "has the labels cat, owl" in result.err and "has cat, dog" in result.err
    result = run_command(*resume, table("c.csv", "dog", "cat"))
    assert result.status == 0 and "done: 4 steps" in result.err, result.err


def test_passes_replace_the_steps_of_the_start(run_command: Callable, ask: Path, small_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start = ["finetune", "--task", "instruction", "--data", ask, "--out", folder, "--from_pretrained", small_folder, *QUIET]
    assert run_command(*start, "--max_steps", 2, "--batch_size", 7, "--patience", 0).status == 0
    result = run_command("finetune", "--resume", folder, "--epochs", 2, "--quiet")
    assert result.status == 0 and "done: 4 steps" in result.err and "--epochs was 3.0, is now 2.0" in result.err


def test_the_last_model_is_kept_on_request(run_command: Callable, text: Path, small_folder: Path, tmp_path: Path) -> None:
    """With this rate, each step is worse than the base."""
    start = ["train", "--data", text, "--init_from", small_folder, *TINY[8:], "--learning_rate", 1, "--max_steps", 3]
    said = {}
    for keep in ("best", "last", "both"):
        result = run_command(*start, "--keep", keep, "--out", tmp_path / keep)
        assert result.status == 0, result.err
        said[keep] = next(line for line in result.err.splitlines() if "no step improved" in line)
    base = GPT2.from_pretrained(small_folder).state_dict()
    for folder, is_base in (("best", True), ("both", True), ("last", False), ("both/last", False)):
        weights = GPT2.from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in base.items()) == is_base, folder
    assert same_weights(tmp_path / "last", tmp_path / "both" / "last") and not (tmp_path / "best" / "last").exists()
    assert "unchanged; lower --learning_rate" in said["best"] and "/last the last one" in said["both"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", ""], '--out "" is empty'),
        (["--data", ""], '--data "" is empty'),
        (["--init_from", ""], '--init_from "" is empty'),
        (["--n_layer", "0"], "--n_layer=0 must be"),
        (["--n_embd", "0"], "--n_embd=0 must be"),
        (["--vocab_size", "0"], "--vocab_size=0 must be"),
        (["--dropout", "nan"], "--dropout=nan must be"),
        (["--min_learning_rate", "0.5"], "--min_learning_rate=0.5 is above learning_rate=0.001"),
        (["--min_learning_rate", "1e-4", "--min_learning_rate_share", "0.1"], "both set the rate of the last step: leave"),
        (["--min_learning_rate_share", "2"], "--min_learning_rate_share=2.0 must be at least 0 and at most 1"),
        (["--schedule", "constant", "--min_learning_rate", "0"], "--min_learning_rate has no meaning with --schedule const"),
        (["--decay_steps", "2"], "--decay_steps has no meaning with --schedule cosine"),
        (["--schedule", "wsd", "--decay_steps", "5"], "--decay_steps=5 after 0 steps of warm-up are more than max_steps=4"),
        (["--warmup_steps", "9"], "--warmup_steps=9 is longer than the run of max_steps=4"),
        (["--max_steps", "1" + "0" * 40], "must be at most 99999999"),
        (["--sample_tokens", "1" + "0" * 40], "--sample_tokens=1"),
        (["--n_layer", "10000000"], "GB of memory for weights"),
        (["--batch_size", "999999999999"], "GB of memory, and this machine has"),
        (["--batch_size", "1" + "0" * 400], "must be at most"),
        (["--workers", "1000000"], "--workers"),
        (["--validation_fraction", "0.1", "--validation_data", "{text}"], "--validation_fraction has no meaning with"),
    ],
)
def test_a_setting_that_contradicts_is_one_line_and_writes_nothing(
    run_command: Callable, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [option.format(text=text) for option in options]
    result = run_command("train", "--data", text, "--out", tmp_path / "run", *TINY, "--max_steps", 4, *filled)
    assert result.status in (1, 2) and words in result.err, result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert not (tmp_path / "run" / "training.json").exists() and not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epochs", "1e308"], "--epochs=1e+308 must be"),
        (["--epochs", "9e7"], "--epochs=90000000.0 over"),
        (["--epochs", "inf"], "--epochs=inf must be"),
        (["--learning_rate", "0"], "--learning_rate=0 must be above 0"),
        (["--max_steps", "0"], "--max_steps=0 must be above 0"),
        (["--max_steps", "2", "--epochs", "2"], "--max_steps is instead of --epochs"),
        (["--evaluations_per_epoch", "1" + "0" * 400], "must be at most"),
        (["--from_pretrained", ""], '--from_pretrained "" is empty'),
        (["--template", ""], '--template "" is empty'),
    ],
)
def test_a_setting_of_finetune_that_contradicts_is_one_line(
    run_command: Callable, ask: Path, small_folder: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    start = ["finetune", "--task", "instruction", "--data", ask, "--out", tmp_path / "run", *QUIET, "--batch_size", 2]
    result = run_command(*start, "--from_pretrained", small_folder, *options)
    assert result.status in (1, 2) and words in result.err, result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
