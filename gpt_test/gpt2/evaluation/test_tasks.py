"""Metrics of tasks equal those from transformers, text by text; an interrupted and continued run equals an unbroken one."""

from __future__ import annotations

import copy
import json
import math
from itertools import chain
from pathlib import Path
from statistics import NormalDist, mean, stdev

import pytest
import torch

from gpt2 import GPT2
from gpt2.evaluation import paper
from gpt2.evaluation.figures import accuracy, perplexity
from gpt2.evaluation.item_log import ItemLog, data_fingerprint, model_fingerprint
from gpt2.evaluation.items import Item
from gpt2.evaluation.tasks import figures, run_task
from gpt_config import DataError, WriteError
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import TRAINING_TEXT, repetitive_model, transformers_twin
from gpt_test.gpt2.evaluation.watched import watched

WORDS = TRAINING_TEXT.split()
LAMBADA = [Item(((" ".join(WORDS[n : n + 2 + n % 30]), f" {WORDS[n + 2 + n % 30]}"),), (1,)) for n in range(35)]
CHOICES = [
    Item(
        tuple((WORDS[n], f" {ending}") for ending in ("cat", "the boats and", WORDS[n + 1])),
        (3, 13, len(WORDS[n + 1])),
        n % 3,
    )
    for n in range(20)
]
SCHEMAS = [Item(((WORDS[n], " cat"), (WORDS[n + 1], " cat"), (WORDS[n], " dog")), (3, 3, 3), 1) for n in range(3)]


@torch.no_grad()
def log_probs_alone(model: GPT2, tokenizer: GPT2Tokenizer, pair: tuple[str, str]) -> tuple[float, bool]:
    before, after = tokenizer.encode(pair[0]), tokenizer.encode(pair[1])
    ids = torch.tensor([(before + after)[-41:]])
    found = transformers_twin(model)(ids[:, :-1]).logits[0, -len(after) :].double().log_softmax(-1)
    return found.gather(1, torch.tensor(after)[:, None]).sum().item(), found.argmax(-1).tolist() == after


def test_lambada(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    alone = [log_probs_alone(small_model, small_tokenizer, item.pairs[0]) for item in LAMBADA]
    records = run_task(small_model, small_tokenizer, LAMBADA, batch_size=3)
    assert [record["log_prob"] for record in records] == pytest.approx([x for x, _ in alone], abs=1e-4)
    assert [record["is_right"] for record in records] == [right for _, right in alone]
    acc, ppl = figures(records)
    assert acc.value == mean(float(right) for _, right in alone)
    assert ppl.value == pytest.approx(math.exp(-mean(x for x, _ in alone)), rel=1e-5)


@pytest.mark.parametrize("items", [CHOICES, SCHEMAS])
def test_choices(small_model: GPT2, small_tokenizer: GPT2Tokenizer, items: list[Item]) -> None:
    right = right_norm = 0
    for item in items:
        sums = [log_probs_alone(small_model, small_tokenizer, pair)[0] for pair in item.pairs]
        by_character = [x / n for x, n in zip(sums, item.lengths, strict=True)]
        right += sums.index(max(sums)) == item.answer
        right_norm += by_character.index(max(by_character)) == item.answer
    acc, acc_norm = figures(run_task(small_model, small_tokenizer, items))
    assert (acc.name, acc.value) == ("accuracy", right / len(items))
    assert (acc_norm.name, acc_norm.value) == ("accuracy_norm", right_norm / len(items))


def test_an_accuracy_has_wilsons_interval() -> None:
    figure = accuracy("acc", [True] * 7 + [False] * 3)
    # Wilson's definition: both ends p of the interval solve |p - 0.7| = z sqrt(p (1 - p) / n).
    for end in (figure.low, figure.high):
        assert abs(end - 0.7) == pytest.approx(NormalDist().inv_cdf(0.975) * math.sqrt(end * (1 - end) / 10))
    assert figure.low < 0.7 < figure.high and figure.standard_error == pytest.approx(stdev([1.0] * 7 + [0.0] * 3) / 10**0.5)
    assert accuracy("acc", [True] * 4).high == 1 and accuracy("acc", [False]).low == 0
    assert accuracy("acc", [False]).standard_error is None


def test_a_perplexity_has_an_interval() -> None:
    log_probs = [-1.0, -2.0, -4.5, -3.0]
    figure = perplexity("ppl", log_probs)
    error = stdev(log_probs) / 2
    assert figure.value == pytest.approx(math.exp(2.625)) and figure.standard_error == pytest.approx(figure.value * error)
    assert math.log(figure.high) - 2.625 == pytest.approx(1.96 * error, rel=1e-4) == 2.625 - math.log(figure.low)
    assert perplexity("ppl", [-1e9]).value == math.inf and perplexity("ppl", [-1.0]).low is None


IDENTITY = {"task": "lambada", "model": "aa", "data": "bb"}


def test_an_interrupted_run_continues_where_it_stopped(
    small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    whole = run_task(small_model, small_tokenizer, LAMBADA, batch_size=2, log=ItemLog(tmp_path / "whole", IDENTITY))
    path = tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_task(small_model, small_tokenizer, LAMBADA, batch_size=2, log=ItemLog(path, IDENTITY), progress=stop_after(12))
    assert len(path.read_bytes().splitlines()) == 16, "finished batches are in the file"
    path.write_bytes(path.read_bytes()[:-9])  # the last line is cut short
    log, model = ItemLog(path, IDENTITY), watched(small_model)
    assert len(log.records) == 15
    records = run_task(model, small_tokenizer, LAMBADA, batch_size=2, log=log)
    assert sum(shape.numel() for shape in model.scored) == sum(record["tokens"] for record in whole[15:]), (
        "only the rest is computed"
    )
    assert [r["log_prob"] for r in records] == pytest.approx([r["log_prob"] for r in whole], abs=1e-5)
    assert [json.loads(line)["item"] for line in path.read_text().splitlines()] == list(range(35))
    model.scored.clear()
    limited = run_task(model, small_tokenizer, LAMBADA[:5], log=ItemLog(path, IDENTITY))
    assert limited == records[:5] and not model.scored


def stop_after(n: int):
    def progress(records: list) -> None:
        if len(records) > n:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"item": 0, "task": "lambada", "model": "ab", "data": "bb"}\n', "belongs to another model .ab instead of aa"),
        ('{"item": 0, "task": "lambada", "model": "aa", "data": "bc"}\n', "belongs to another data"),
        ('{"item": 0, "task": "hellaswag", "model": "aa", "data": "bb"}\n', "belongs to another task"),
        ('{"item": 1, "task": "lambada", "model": "aa", "data": "bb"}\n', "line 1 is not item 0"),
        ("my notes\n", "line 1 is not item 0"),
        ("[]\n", "line 1 is not item 0"),
        ("my notes", "not an item log"),
    ],
)
def test_the_file_of_another_run_is_refused_and_unchanged(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "log").write_text(content)
    with pytest.raises(DataError, match=words):
        ItemLog(tmp_path / "log", IDENTITY)
    assert (tmp_path / "log").read_text() == content


def test_a_path_that_cannot_be_written_is_an_error_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="name another file"):
        ItemLog(tmp_path, IDENTITY)


def test_fingerprints_distinguish_models_and_data(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    other = repetitive_model(small_model.config)
    assert model_fingerprint(small_model, small_tokenizer) == model_fingerprint(other, small_tokenizer)
    with torch.no_grad():
        other.h[1].mlp.c_fc.bias[3] += 1e-6
    in_bfloat16 = repetitive_model(small_model.config, dtype=torch.bfloat16)
    assert len({model_fingerprint(m, small_tokenizer) for m in (small_model, other, in_bfloat16)}) == 3
    empty = [copy.deepcopy(small_model).to(dtype) for dtype in (torch.float16, torch.bfloat16)]  # zeros have the same bytes
    with torch.no_grad():
        for parameter in chain.from_iterable(model.parameters() for model in empty):
            parameter.zero_()
    assert len({model_fingerprint(model, small_tokenizer) for model in empty}) == 2
    assert data_fingerprint(LAMBADA) != data_fingerprint(LAMBADA[1:]) != data_fingerprint(CHOICES)


def test_the_papers_rows() -> None:
    assert paper.rows_beside("lambada")["LAMBADA ACC"] == {"117M": 45.99, "345M": 55.48, "762M": 60.12, "1542M": 63.24}
    assert paper.rows_beside("ptb") == {"PTB PPL": {"117M": 65.85, "345M": 47.33, "762M": 40.31, "1542M": 35.76}}
    assert "52.66" in paper.table_beside("lambada") and "29.41" in paper.table_beside("wikitext")
    assert all(len(row) == len(paper.SIZES) for row in paper.TABLE_3.values())
    assert paper.table_beside("hellaswag") == "" and paper.rows_beside("hellaswag") == {}
