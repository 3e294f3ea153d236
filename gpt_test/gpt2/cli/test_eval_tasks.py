"""`--eval_tasks` and `--log`: figures of tasks in the metrics of a run, the same when it is resumed, and early errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2.training.run_logs import read_metrics

_TINY = (
    "--tokenizer char --n_layer 1 --n_head 1 --n_embd 8 --context 32 --batch_size 2 --max_steps 4 --eval_interval 2 "
    "--eval_batches 1 --log_interval 1 --checkpoint_interval 2 --sample_tokens 0 --workers 1 --keep last"
)
TINY = _TINY.split()
TEXT = "to be or not to be, that is the question. " * 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a text and the items of two tasks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpt2.training.loop.plot_losses", lambda folder: None)  # it takes longer than these runs
    Path("text.txt").write_text(TEXT)
    lines = [{"text": "to be or not to be"}, {"text": "that is the question."}, {"text": "is it not"}]
    Path("lambada.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    choices = {"context": "to be or", "choices": ["not to be", "question"], "answer": 0}
    Path("choices.jsonl").write_text(json.dumps(choices) + "\n")
    return tmp_path


def scores(run: Path) -> dict[int, dict[str, Any]]:
    """The figures of tasks of each evaluation, by its step."""
    names = ("lambada_", "multiple_choice_")
    lines = [line for line in read_metrics(run) if "validation_loss" in line]
    return {line["step"]: {name: value for name, value in line.items() if name.startswith(names)} for line in lines}


def test_figures_are_those_of_evaluate_and_of_a_resumed_run(run_command: Callable, folder: Path) -> None:
    """The figures of the last step are those of the model in the folder. The file of lambada is found by its name."""
    tasks = ["--eval_tasks", "lambada, multiple_choice=choices.jsonl", "--eval_limit", 2]
    result = run_command("train", "--data", "text.txt", "--out", "run", *TINY, "--quiet", *tasks)
    assert result.status == 0, result.err
    found = scores(folder / "run")
    assert list(found) == [0, 2, 4] and len({line["lambada_perplexity"] for line in found.values()}) == 3
    for task, file in (("lambada", "lambada.jsonl"), ("multiple_choice", "choices.jsonl")):
        call = ["evaluate", file, "--task", task, "--limit", 2, "--from_pretrained", "run", "--json"]
        measured = json.loads(run_command(*call).out)
        for name in [name for name in found[4] if name.startswith(task)]:
            assert found[4][name] == pytest.approx(measured[name.removeprefix(f"{task}_")]["value"], rel=1e-6), name
    stored = json.loads((folder / "run" / "training.json").read_text())
    assert stored["eval_tasks"][0] == f"lambada={folder.resolve() / 'lambada.jsonl'}" and stored["eval_limit"] == 2
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    result = run_command("train", "--resume", "../run", "--step", 2)
    assert result.status == 0 and scores(folder / "run") == found, result.err
    assert ", lambada accuracy 0" in result.err and ", multiple choice accuracy norm " in result.err
    result = run_command("train", "--resume", "../run", "--max_steps", 6, "--eval_tasks", "")
    assert result.status == 0 and "--eval_tasks was lambada=" in result.err and "is now not given" in result.err
    assert scores(folder / "run") == {**found, 6: {}}


def test_the_average_of_the_weights_is_scored(run_command: Callable, folder: Path) -> None:
    """With --ema, the figures are those of the model in the folder, which is the average, and not those of the weights."""
    call = ["train", "--data", "text.txt", *TINY, "--quiet", "--eval_tasks", "lambada", "--learning_rate", 0.01, "--out"]
    for options in (["weights"], ["average", "--ema", 0.9]):
        result = run_command(*call, *options)
        assert result.status == 0, result.err
    weights, average = (scores(folder / name)[4]["lambada_perplexity"] for name in ("weights", "average"))
    saved = json.loads(
        run_command("evaluate", "lambada.jsonl", "--task", "lambada", "--from_pretrained", "average", "--json").out
    )
    assert average == pytest.approx(saved["perplexity"]["value"], rel=1e-6)
    assert average != pytest.approx(weights, rel=1e-2)


def test_fine_tuning_scores_too(run_command: Callable, folder: Path, small_folder: Path) -> None:
    options = ["--max_steps", 1, "--batch_size", 2, "--context", 8, "--sample_tokens", 0, "--lora_rank", 2]
    call = ["finetune", "--data", "text.txt", "--from_pretrained", small_folder, *options]
    result = run_command(*call, "--out", "run", "--eval_tasks", "lambada")
    assert result.status == 0 and ", lambada accuracy " in result.err, result.err
    assert list(scores(folder / "run")) == [0, 1] and scores(folder / "run")[1].keys() == {
        "lambada_accuracy", "lambada_perplexity",
    }  # fmt: skip
    result = run_command(*call, "--task", "classification", "--out", "other", "--eval_tasks", "lambada")
    assert result.status == 2 and "--eval_tasks is for --task text or instruction or preference" in result.err


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (
            ["--eval_tasks", "lambda"],
            2,
            "--eval_tasks: 'lambda' is not a task: write NAME=FILE with one of lambada, hellaswag, multiple_choice",
        ),
        (["--eval_tasks", "lambada,lambada=choices.jsonl"], 2, "--eval_tasks: lambada is there twice"),
        (["--eval_tasks", "lambada,"], 2, "has a comma with nothing on one side"),
        (["--eval_tasks", "hellaswag"], 1, "hellaswag.jsonl with the items of hellaswag: name it as hellaswag=FILE"),
        (["--eval_tasks", "hellaswag=choices.jsonl"], 1, "choices.jsonl, line 1: the field 'ctx' is missing"),
        (["--eval_tasks", "lambada=odd.jsonl"], 1, "odd.jsonl, item 1: the character 'X'"),
        (["--eval_tasks", "lambada", "--engine", "numpy"], 2, "--engine numpy does not score tasks"),
        (["--eval_limit", "3"], 2, "--eval_limit is for --eval_tasks"),
        (["--log", "mlflow"], 2, "--log='mlflow' must be one of jsonl, tensorboard, wandb"),
        (["--log", "jsonl,wandb"], 1, "--log=wandb needs the package wandb, which is not installed: pip install '.[wandb]'"),
        (["--log", "tensorboard"], 1, "--log=tensorboard needs the package tensorboard, which is not installed"),
        (
            ["--tensorboard"],
            1,
            "--tensorboard needs the package tensorboard, which is not installed: pip install '.[train]'",
        ),
    ],
)
def test_a_mistake_is_one_line_before_the_run(
    run_command: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], status: int, words: str
) -> None:
    for package in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    (folder / "odd.jsonl").write_text('{"text": "to be X"}\n')
    result = run_command("train", "--data", "text.txt", "--out", "run", *TINY, "--quiet", *options)
    assert result.status == status and words in result.err.splitlines()[-1], result.err
    assert "log=" not in result.err.replace("--log=", "")
    assert not (folder / "run" / "metrics.jsonl").exists() and not (folder / "run" / "training.json").exists()


def test_shown_options_can_be_read_again(run_command: Callable, folder: Path) -> None:
    given = [
        "--eval_tasks",
        "lambada,multiple_choice=choices.jsonl",
        "--log",
        "jsonl,tensorboard",
        "--add_tokens",
        "<a>,<b>",
    ]
    shown = run_command("train", *given, "--show_config").out
    (folder / "my.toml").write_text(shown)
    again = run_command("train", "--config", "my.toml", "--show_config").out
    assert [line.split("  #")[0] for line in again.splitlines()] == [line.split("  #")[0] for line in shown.splitlines()]
    assert f'eval_tasks = "lambada={folder.resolve() / "lambada.jsonl"},multiple_choice=' in again
