"""`gpt2 train`: from a text to a model folder, and one line per error."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2 import GPT2
from gpt2.cli.train import train
from gpt2.training import prepare, shakespeare
from gpt2.training.run_logs import read_metrics
from gpt_config import DataError, TrainingConfig

_TINY = (
    "--n_layer 1 --n_head 1 --n_embd 8 --context 8 --batch_size 2 --max_steps 4 --eval_interval 2 --eval_batches 1 "
    "--log_interval 1 --checkpoint_interval 2 --sample_tokens 4"
)
TINY = _TINY.split()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question. " * 20)
    return path


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size"),
    [(["--tokenizer", "char"], 16), (["--tokenizer", "bpe", "--vocab_size", "270"], 270), ([], 50257)],
)
def test_the_folder_is_a_model_that_generates(
    run_command: Callable, text: Path, tmp_path: Path, tokenizer: list[str], vocab_size: int
) -> None:
    result = run_command("train", "--data", text, "--out", tmp_path / "run", *TINY, *tokenizer, "--sample_prompt", "to")
    assert result.status == 0, result.err
    assert "validation loss" in result.err and "  | to" in result.err and "done: 4 steps" in result.err
    assert result.out == ""
    assert GPT2.from_pretrained(tmp_path / "run").config.vocab_size == vocab_size
    result = run_command("generate", "to be", "--from_pretrained", tmp_path / "run", "--max_tokens", 3)
    assert result.status == 0 and result.out.startswith("to be")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install -r requirements-dev.txt)")
    assert {"config.json", "model.safetensors", "metrics.jsonl", "loss.png", "training.json", "checkpoints"} <= names


def test_fine_tuning_starts_from_the_weights(run_command: Callable, text: Path, small_folder: Path, tmp_path: Path) -> None:
    options = ["--context", 8, "--batch_size", 2, "--max_steps", 1, "--sample_tokens", 0, "--dropout", 0]
    options += ["--learning_rate", 0, "--min_learning_rate", 0]
    result = run_command("train", "--data", text, "--out", tmp_path / "run", "--init_from", small_folder, *options)
    assert result.status == 0, result.err
    before, after = GPT2.from_pretrained(small_folder), GPT2.from_pretrained(tmp_path / "run")
    assert after.config.n_positions == 40 and after.config.attn_pdrop == 0.0
    assert all((a == b).all() for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_resume_uses_the_stored_options(run_command: Callable, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_command("train", "--data", text, "--out", folder, *TINY, "--tokenizer", "char").status == 0
    whole = read_metrics(folder)
    (folder / "checkpoints" / "step-00000004.safetensors").unlink()
    result = run_command("train", "--resume", folder, "--quiet")
    assert result.status == 0 and "done: 4 steps" in result.err
    for one, other in zip(whole, read_metrics(folder), strict=True):
        assert {**one, "tokens_per_second": 0} == {**other, "tokens_per_second": 0}
    result = run_command("train", "--resume", folder)
    assert result.status == 0 and "has already done all of its 4 steps" in result.err
    result = run_command("train", "--resume", folder, "--batch_size", 3)
    assert result.status == 2 and "--batch_size cannot change" in result.err


def test_a_run_of_an_older_version_can_be_resumed(run_command: Callable, text: Path, tmp_path: Path) -> None:
    """Its file lacks options of later versions, and may have one that no longer exists."""
    folder = tmp_path / "run"
    assert run_command("train", "--data", text, "--out", folder, *TINY, "--tokenizer", "char").status == 0
    stored = json.loads((folder / "training.json").read_text())
    assert not {"out", "resume", "from_step", "config"} & stored.keys() and stored["max_steps"] == 4
    older = {name: value for name, value in stored.items() if name not in ("engine", "patience", "tensorboard")}
    (folder / "training.json").write_text(json.dumps({**older, "gone": 1}))
    (folder / "checkpoints" / "step-00000004.safetensors").unlink()
    result = run_command("train", "--resume", folder, "--quiet")
    assert result.status == 0 and "done: 4 steps" in result.err, result.err
    (folder / "training.json").write_text(json.dumps({**older, "max_steps": 0}))
    result = run_command("train", "--resume", folder)
    assert result.status == 2 and "--max_steps=0 must be" in result.err
    del older["dropout"]
    (folder / "training.json").write_text(json.dumps(older))
    result = run_command("train", "--resume", folder)
    assert result.status == 1 and "is damaged (options are missing)" in result.err


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_can_be_used(
    run_command: Callable, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert run_command("train", "--data", text, "--out", folder, *TINY, "--tokenizer", "char").status == 0
    newest = folder / "checkpoints" / "step-00000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    result = run_command("train", "--resume", folder)
    assert result.status == 1 and "step-00000004.safetensors is damaged" in result.err and "--step 2" in result.err
    result = run_command("train", "--resume", folder, "--step", 2)
    assert result.status == 0 and "done: 4 steps" in result.err


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--data", "{text}"], 2, "--out FOLDER to start a run, or --resume FOLDER"),
        (["--out", "{run}"], 2, "--data PATH"),
        (["--data", "{text}", "--out", "{run}", "--step", "3"], 2, "--step is for --resume"),
        (["--data", "nowhere.txt", "--out", "{run}"], 1, "no file or folder nowhere.txt"),
        (["--data", "{text}", "--out", "{run}", "--batch_size", "0"], 2, "--batch_size=0 must be"),
        (["--data", "{text}", "--out", "{run}", "--precision", "int4"], 2, "int4"),
        (["--data", "{text}", "--out", "{run}", "--preset", "gpt2", "--n_layer", "2"], 2, "--preset has its own sizes"),
        (["--data", "{text}", "--out", "{run}", "--init_from", "x", "--n_embd", "2"], 2, "--init_from has its own sizes"),
        (["--data", "{text}", "--out", "{run}", "--init_from", "x", "--tokenizer", "char"], 2, "has its own tokenizer"),
        (
            ["--data", "{text}", "--out", "{run}", "--tokenizer", "char", "--context", "900"],
            1,
            "too few for one row of context=900",
        ),
        (["--data", "{text}", "--out", "{run}", "--vocab_size", "300"], 1, "vocab_size=300"),
        (["--resume", "{run}"], 1, "contains no run"),
    ],
)
def test_each_mistake_is_one_line(
    run_command: Callable, text: Path, tmp_path: Path, options: list[str], status: int, words: str
) -> None:
    filled = [option.format(text=text, run=tmp_path / "run") for option in options]
    result = run_command("train", *filled)
    assert result.status == status and words in result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert not (tmp_path / "run" / "training.json").exists(), "a run that cannot start must not block the next"


def test_a_run_resumes_without_its_texts_but_not_with_others(run_command: Callable, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_command("train", "--data", text, "--out", folder, *TINY, "--tokenizer", "char").status == 0
    (folder / "checkpoints" / "step-00000004.safetensors").unlink()
    content = text.read_text()
    text.unlink()
    assert run_command("train", "--resume", folder, "--quiet").status == 0
    text.write_text(content + "!")
    prepare([text], folder / "data", tokenizer="char")
    result = run_command("train", "--resume", folder)
    assert result.status == 1 and "are not those that this run started with" in result.err


def test_a_folder_with_a_model_or_a_run_is_not_overwritten(
    run_command: Callable, text: Path, tmp_path: Path, small_folder: Path
) -> None:
    result = run_command("train", "--data", text, "--out", small_folder)
    assert result.status == 2 and "contains a model, which training would overwrite" in result.err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training.json").write_text("{")
    result = run_command("train", "--data", text, "--out", tmp_path / "run")
    assert result.status == 2 and "already contains a run" in result.err
    result = run_command("train", "--resume", tmp_path / "run")
    assert result.status == 1 and "is damaged" in result.err


def test_every_field_of_the_config_is_an_option_with_its_default() -> None:
    options = {parameter.name: parameter for parameter in train.params}
    for field in dataclasses.fields(TrainingConfig):
        assert options[field.name].default == field.default and options[field.name].help


def test_shakespeare_is_fetched_once_and_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    asked, is_reachable = [], [True]

    def answer(url: str, timeout: float) -> io.BytesIO:
        if not is_reachable[0]:
            raise urllib.error.URLError("no network")
        asked.append(url)
        return io.BytesIO(b"First Citizen:")

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(DataError, match="has changed"):
        shakespeare.resolve("shakespeare")
    sha256 = hashlib.sha256(b"First Citizen:").hexdigest()
    for _ in range(2):
        assert Path(shakespeare.resolve("shakespeare", sha256=sha256)).read_bytes() == b"First Citizen:"
    assert len(asked) == 2, "the second time it is read from the cache"
    next(tmp_path.rglob("tinyshakespeare.txt")).unlink()
    is_reachable[0] = False
    with pytest.raises(DataError, match="no network"):
        shakespeare.resolve("shakespeare")
    assert shakespeare.resolve("./shakespeare") == "./shakespeare"


def test_metrics_have_every_field_of_a_curve(run_command: Callable, text: Path, tmp_path: Path) -> None:
    run_command("train", "--data", text, "--out", tmp_path / "run", *TINY, "--tokenizer", "char", "--quiet", "--tensorboard")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert set(steps[0]) == {"step", "loss", "learning_rate", "gradient_norm", "tokens_per_second"}
    evaluations = [line for line in lines if "validation_loss" in line]
    assert set(evaluations[0]) == {"step", "validation_loss", "perplexity", "bits_per_byte", "sample"}
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install -r requirements-dev.txt)")
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_a_run_that_started_from_a_model_can_be_resumed(
    run_command: Callable, text: Path, small_folder: Path, tmp_path: Path
) -> None:
    options = ["--context", 8, "--batch_size", 2, "--max_steps", 4, "--sample_tokens", 0, "--checkpoint_interval", 2]
    run = tmp_path / "run"
    assert run_command("train", "--data", text, "--out", run, "--init_from", small_folder, *options).status == 0
    expected = GPT2.from_pretrained(run).state_dict()
    (run / "checkpoints" / "step-00000004.safetensors").unlink()
    result = run_command("train", "--resume", run)
    assert result.status == 0 and "done: 4 steps" in result.err, result.err
    assert all((tensor == expected[name]).all() for name, tensor in GPT2.from_pretrained(run).state_dict().items())
