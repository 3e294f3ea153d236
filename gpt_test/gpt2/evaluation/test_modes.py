"""What measures a model does not depend on its mode, leaves each part in its mode, and refuses NaN with one error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.evaluation import Request, evaluate, log_likelihoods
from gpt2.evaluation.item_log import ItemLog
from gpt2.evaluation.items import Item
from gpt2.evaluation.tasks import figures, run_task
from gpt2.evaluation.token_scores import score_tokens
from gpt2.finetuning.classification import classify
from gpt2.finetuning.classifier import GPT2Classifier
from gpt_config import CheckpointError, GPT2Config, InputError
from gpt_config.json_text import to_json
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model

IDS = list(range(1, 60))


@pytest.fixture
def model(small_config: GPT2Config) -> GPT2:
    """A model with dropout whose parts are in different modes."""
    model = random_model(small_config)
    model.set_dropout(0.5)
    model.train()
    model.h[0].eval()
    return model


def modes(model: GPT2) -> list[bool]:
    return [part.training for part in model.modules()]


def measures(tokenizer: GPT2Tokenizer) -> dict[str, Callable[[GPT2], object]]:
    return {
        "evaluate": lambda model: evaluate(model, IDS).loss,
        "score": lambda model: [score.log_prob for score in score_tokens(model, tokenizer, "once upon a time")],
        "tasks": lambda model: log_likelihoods(model, [Request([1, 2], [[3, 4], [5]])]),
        "classify": lambda model: dict(classify(_classifier(model), [[1, 2, 3], [4]])),
    }


def _classifier(model: GPT2) -> GPT2Classifier:
    torch.manual_seed(0)
    return GPT2Classifier(model, ["a", "b"])


@pytest.mark.parametrize("name", ["evaluate", "score", "tasks", "classify"])
def test_figures_do_not_depend_on_the_mode(model: GPT2, small_tokenizer: GPT2Tokenizer, name: str) -> None:
    measure, before = measures(small_tokenizer)[name], modes(model)
    mixed = measure(model)
    assert modes(model) == before
    assert mixed == measure(model.train()) and all(modes(model))
    assert mixed == measure(model.eval()) and not any(modes(model))


@pytest.mark.parametrize("name", ["evaluate", "score", "tasks", "classify"])
def test_nan_is_the_same_error_and_the_mode_stays(model: GPT2, small_tokenizer: GPT2Tokenizer, name: str) -> None:
    before = modes(model)
    with torch.no_grad():
        model.ln_f.bias[0] = math.nan
    with pytest.raises(CheckpointError, match=r"^the model computes NaN: its weights are damaged"):
        measures(small_tokenizer)[name](model)
    assert modes(model) == before


def test_an_error_in_the_middle_leaves_the_mode(model: GPT2) -> None:
    before = modes(model)

    def fail(n_tokens: int) -> None:
        raise InputError("stop")

    with pytest.raises(InputError):
        evaluate(model, IDS, progress=fail)
    assert modes(model) == before


def test_json_has_no_nan_and_no_infinity() -> None:
    value = {"a": [math.nan, math.inf, 1.5], "b": {"c": (-math.inf, True, None, "NaN")}}
    assert json.loads(to_json(value)) == {"a": [None, None, 1.5], "b": {"c": [None, True, None, "NaN"]}}


def test_a_probability_of_zero_survives_the_log(small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """JSON has no infinity, so its logarithm is null in the file."""
    items = [Item((("a", " b"),), (1,)), Item((("a", " c"),), (1,))]
    log = ItemLog(tmp_path / "log", {})
    log.append([{"log_prob": -math.inf, "is_right": False, "tokens": 1}] * 2)
    assert "Infinity" not in (tmp_path / "log").read_text()
    records = run_task(small_model, small_tokenizer, items, log=ItemLog(tmp_path / "log", {}))
    assert [record["log_prob"] for record in records] == [-math.inf] * 2
    assert figures(records)[1].value == math.inf
