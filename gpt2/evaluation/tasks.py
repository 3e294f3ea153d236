"""Run tasks: score their items and compute metrics as lm-evaluation-harness defines them. It knows items, not files.

lambada: `accuracy` is the share of items whose last word greedy decoding would produce, token by token. `perplexity` is exp
of the mean over items of -log p of the whole word.

Other tasks: the model's answer is the choice with the highest log p for `accuracy`, and the choice with the highest log p
per character for `accuracy_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from gpt2.evaluation.figures import Figure, accuracy, perplexity
from gpt2.evaluation.item_log import ItemLog
from gpt2.evaluation.items import Item, encode_pair
from gpt2.evaluation.scoring import Request, Score, log_likelihoods
from gpt2.model import GPT2
from gpt2.weights.tokenizer import check_ids
from gpt_config.validation import check_whole
from gpt_encoder.interface import Tokenizer

# Batches between two writes to the log. Items are sorted by length only within these batches, so the log keeps their order.
_BATCHES_AT_ONCE = 4


def run_task(
    model: GPT2,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    batch_size: int = 8,
    log: ItemLog | None = None,
    progress: Callable[[list[dict[str, Any]]], object] = lambda records: None,
) -> list[dict[str, Any]]:
    """One record per item, in order. `figures` turns them into metrics.

    With a `log`, items whose records it already holds are not computed again, and new records are appended to it.
    `progress` is called with all records so far. ConfigError if `batch_size` is invalid.
    """
    check_whole("batch_size", batch_size, 1)
    records = [] if log is None else [_restored(record) for record in log.records[: len(items)]]
    progress(records)
    for start in range(len(records), len(items), size := batch_size * _BATCHES_AT_ONCE):
        part = items[start : start + size]
        new = [_record(item, scores) for item, scores in zip(part, _score(model, tokenizer, part, batch_size), strict=True)]
        if log is not None:
            log.append(new)
        records = records + new
        progress(records)
    return records


def figures(records: Sequence[dict[str, Any]]) -> list[Figure]:
    """The metrics of a task, computed from its records (at least one)."""
    if "log_prob" in records[0]:
        return [
            accuracy("accuracy", [record["is_right"] for record in records]),
            perplexity("perplexity", [record["log_prob"] for record in records]),
        ]
    return [
        accuracy("accuracy", [record["choice"] == record["answer"] for record in records]),
        accuracy("accuracy_norm", [record["choice_norm"] == record["answer"] for record in records]),
    ]


def _score(model: GPT2, tokenizer: Tokenizer, items: Sequence[Item], batch_size: int) -> list[list[Score]]:
    requests, n_requests = [], []
    for item in items:
        pairs = [encode_pair(tokenizer, *pair) for pair in item.pairs]
        for ids in chain.from_iterable(pairs):
            check_ids(ids, tokenizer, model.config.vocab_size)
        is_shared = all(context == pairs[0][0] for context, _ in pairs)
        groups = [pairs] if is_shared else [[pair] for pair in pairs]
        requests += [Request(group[0][0], [continuation for _, continuation in group]) for group in groups]
        n_requests.append(len(groups))
    scores = iter(log_likelihoods(model, requests, batch_size=batch_size))
    return [[score for _ in range(n) for score in next(scores)] for n in n_requests]


def _restored(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record from a log. JSON has no infinity, so the logarithm of a probability of 0 is null there."""
    if "log_probs" in record:
        return {**record, "log_probs": [_log_prob(value) for value in record["log_probs"]]}
    return {**record, "log_prob": _log_prob(record["log_prob"])} if "log_prob" in record else record


def _log_prob(value: float | None) -> float:
    return -math.inf if value is None else value


def _record(item: Item, scores: list[Score]) -> dict[str, Any]:
    if len(scores) == 1:
        [score] = scores
        return {"log_prob": score.log_prob, "is_right": score.is_greedy, "tokens": score.n_tokens}
    log_probs = [score.log_prob for score in scores]
    by_character = [log_prob / length for log_prob, length in zip(log_probs, item.lengths, strict=True)]
    return {
        "log_probs": log_probs,
        "choice": log_probs.index(max(log_probs)),
        "choice_norm": by_character.index(max(by_character)),
        "answer": item.answer,
        "tokens": [score.n_tokens for score in scores],
    }
