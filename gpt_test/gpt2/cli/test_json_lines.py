"""`--json` means the same in every command: one JSON object per line on stdout, nothing else, and the same field names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from gpt2 import GPT2
from gpt2.cli.group import cli, load_command
from gpt2.cli.json_lines import json_line
from gpt2.finetuning.classifier import GPT2Classifier
from gpt2.finetuning.classifier_files import save_classifier
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import TRAINING_TEXT, random_model

TEXT = "The café cat 🦙 sat.\u2028"  # U+2028 ends a line for str.splitlines and for many readers
NAMES = [name for name in cli.list_commands(click.Context(cli))]
WITH_JSON = [name for name in NAMES if any(parameter.name == "as_json" for parameter in load_command(name).params)]
# What every object of a command has.
FIELDS = {
    "benchmark": {"model", "environment", "settings", "peers", "memory", "rows", "left_out"},
    "classify": {"model", "text", "label", "probabilities"},
    "data": {"model", "training", "validation", "shared_documents", "shared_13_grams"},
    "embed": {"model", "text", "embedding"},
    "evaluate": {"model", "task", "accuracy", "perplexity"},
    "generate": {
        "model",
        "prompt",
        "completion",
        "prompt_ids",
        "ids",
        "logprobs",
        "finish_reason",
        "sample",
        "seed",
        "timings",
    },
    "score": {"model", "source", "tokens", "total"},
    "tokenize": {"model", "ids", "pieces", "byte_spans"},
    "verify": {"model", "failed", "checks"},
}


def read(line: str) -> dict[str, Any]:
    """The object of a line of strict JSON, which has no NaN and no infinity."""
    assert line.isascii()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    values = json.loads(line, parse_constant=refuse)
    assert isinstance(values, dict)
    return values


@pytest.fixture
def calls(small_folder: Path, small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> dict[str, list[object]]:
    """A call of each command, whose stdin is TEXT twice, on two lines."""
    save_classifier(GPT2Classifier(small_model, ["yes", "nö"]), tmp_path / "classifier", small_tokenizer)
    (tmp_path / "lambada.jsonl").write_text(json.dumps({"text": "The cat went down to the water"}))
    (tmp_path / "story.txt").write_text(TRAINING_TEXT)
    model = ["--from_pretrained", small_folder]
    few = ["--sections", "tokenizer", "--peers", "none", "--dtypes", "float32", "--rounds", 1, "--threads", 1]
    return {
        "benchmark": [*few, *model, "--text", tmp_path / "story.txt"],
        "classify": ["-", "--from_pretrained", tmp_path / "classifier"],
        "data": [tmp_path / "story.txt", "--tokenizer", small_folder],
        "embed": ["-", *model],
        "evaluate": [tmp_path / "lambada.jsonl", "--task", "lambada", *model],
        "generate": ["-", "--do_sample", "--num_samples", 2, "--max_tokens", 5, "--seed", 1, *model],
        "score": ["-", tmp_path / "story.txt", *model],
        "tokenize": ["-", "--model_name", small_folder],
        "verify": [small_folder],
    }


def test_every_command_with_json_is_tested() -> None:
    assert set(WITH_JSON) == set(FIELDS)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_stdout_has_an_object_per_line_and_nothing_else(run_command: Callable, calls: dict, name: str) -> None:
    result = run_command(name, *calls[name], "--json", stdin=f"{TEXT}\n{TEXT}\n".encode())
    assert result.status == 0, result.err
    assert result.out.endswith("\n")
    objects = [read(line) for line in result.out.splitlines()]
    assert len(objects) == (2 if name in ("classify", "embed", "generate", "score") else 1)
    folder = next(value for value in reversed(calls[name]) if isinstance(value, Path) and value.is_dir())
    for values in objects:
        assert values.keys() >= FIELDS[name] and values["model"] == str(folder)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_the_help_states_the_rule_and_the_fields(name: str) -> None:
    (option,) = [parameter for parameter in load_command(name).params if parameter.name == "as_json"]
    assert option.opts == ["--json"] and option.is_flag
    assert option.help.startswith("Print one JSON object per line and nothing else on stdout: one ")
    fields = FIELDS[name] - ({"accuracy", "perplexity"} if name == "evaluate" else {"prompt_ids"})
    assert all(field in option.help for field in fields)


def test_the_same_thing_has_the_same_name(run_command: Callable, calls: dict) -> None:
    tokenized, generated, scored = (
        read(run_command(name, *calls[name], "--json", stdin=TEXT.encode()).out.splitlines()[0])
        for name in ("tokenize", "generate", "score")
    )
    assert tokenized["ids"] == generated["prompt_ids"] == [token["id"] for token in scored["tokens"]]
    assert tokenized["pieces"] == [token["piece"] for token in scored["tokens"]]
    assert tokenized["byte_spans"] == [token["byte_span"] for token in scored["tokens"]]
    assert len(generated["ids"]) == len(generated["logprobs"])
    for values in (*scored["tokens"], scored["total"]):
        assert values["logprob"] == values["log_prob"] <= 0, "the older name stays"


def test_a_text_has_its_task(run_command: Callable, tmp_path: Path, small_folder: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    values = read(run_command("evaluate", tmp_path / "text.txt", "--from_pretrained", small_folder, "--json").out)
    assert values.keys() >= FIELDS["evaluate"] and values["task"] == "perplexity"


def test_an_infinite_figure_is_null(run_command: Callable, small_config, small_tokenizer, tmp_path: Path) -> None:
    model = random_model(small_config)
    with torch.no_grad():
        model.ln_f.weight.mul_(1e5)
    model.save_pretrained(tmp_path / "model", tokenizer=small_tokenizer)
    (tmp_path / "text.txt").write_text(TEXT)
    for name in ("evaluate", "score"):
        result = run_command(name, tmp_path / "text.txt", "--from_pretrained", tmp_path / "model", "--json")
        values = read(result.out)
        values = values if name == "evaluate" else values["total"]
        assert values["perplexity"] is None and values["bits_per_byte"] > 700


def test_the_formats_of_score_and_classify(run_command: Callable, calls: dict) -> None:
    stdin = TEXT.encode()
    as_json = run_command("score", *calls["score"], "--json", stdin=stdin).out
    assert run_command("score", *calls["score"], "--format", "json", stdin=stdin).out == as_json
    assert run_command("score", *calls["score"], "--format", "json", "--json", stdin=stdin).out == as_json
    wrong = run_command("score", *calls["score"], "--format", "table", "--json", stdin=stdin)
    assert wrong.status == 2 and "--json is --format json: leave out --json or --format table" in wrong.err
    as_json = run_command("classify", *calls["classify"], "--json", stdin=stdin).out
    assert run_command("classify", *calls["classify"], stdin=stdin).out == as_json


def test_without_json_a_benchmark_has_a_table_before_its_object(run_command: Callable, calls: dict) -> None:
    *table, last = run_command("benchmark", *calls["benchmark"]).out.splitlines()
    assert "tokenizer" in table and read(last).keys() >= FIELDS["benchmark"]


def test_an_error_leaves_stdout_empty(run_command: Callable) -> None:
    for name in ("evaluate", "generate", "score"):
        result = run_command(name, "-", "--from_pretrained", "no/such/place", "--json", stdin=b"x")
        assert (result.status, result.out) == (1, "") and len(result.err.splitlines()) == 1


def test_a_line_is_strict_json_in_ascii() -> None:
    values = {"a": [1, (math.inf, {"b": math.nan})], "c": "é\u2028\n", "d": None, "e": True}
    assert json_line(values) == '{"a": [1, [null, {"b": null}]], "c": "\\u00e9\\u2028\\n", "d": null, "e": true}'
