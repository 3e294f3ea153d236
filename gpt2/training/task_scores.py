"""Scores of a model on tasks while it trains: those of `gpt2 evaluate`, on the first items. It knows items, not trainers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from gpt2.evaluation.items import TASKS, Item, encode_pair, read_items
from gpt2.evaluation.tasks import figures, run_task
from gpt2.model import GPT2
from gpt2.weights.tokenizer import check_ids
from gpt_config.errors import ConfigError, DataError, InputError
from gpt_config.model_config import GPT2Config
from gpt_encoder.interface import Tokenizer


class Task(NamedTuple):
    """A name of TASKS, the file with its items, and those that are scored."""

    name: str
    file: str
    items: list[Item]


def read_tasks(named: Sequence[str], limit: int) -> list[Task]:
    """Return the first `limit` items of each task. `named` has texts of the form "lambada=FILE".

    ConfigError, with the field eval_tasks, for another name or one that is there twice. DataError for a file that is missing
    or wrong; the message gives the line.
    """
    found: dict[str, Task] = {}
    for text in named:
        name, _, file = text.partition("=")
        if name not in TASKS:
            known = ", ".join(TASKS)
            raise ConfigError(f"eval_tasks: {name!r} is not a task: write NAME=FILE with one of {known}", field="eval_tasks")
        if name in found:
            raise ConfigError(f"eval_tasks: {name} is there twice: leave one out", field="eval_tasks")
        if not Path(file).is_file():
            raise DataError(f"there is no file {file} with the items of {name}: name it as {name}=FILE")
        found[name] = Task(name, file, read_items(file, name)[:limit])
    return list(found.values())


class TaskScores:
    """Returns the figures of a model on `tasks` when it is called, each named "lambada_accuracy" and so on.

    They are those that `gpt2 evaluate` measures on the same items with the saved model. InputError, before the run begins,
    if the `tokenizer` or a model of this `config` cannot read an item.
    """

    def __init__(self, tasks: Sequence[Task], tokenizer: Tokenizer, config: GPT2Config) -> None:
        self._tasks, self._tokenizer = tasks, tokenizer
        for task in tasks:
            for number, item in enumerate(task.items, 1):
                try:
                    for ids in chain.from_iterable(encode_pair(tokenizer, *pair) for pair in item.pairs):
                        check_ids(ids, tokenizer, config.vocab_size)
                except InputError as error:
                    raise InputError(f"{task.file}, item {number}: {error}") from None

    def __call__(self, model: GPT2) -> dict[str, float]:
        scores = {}
        for task in self._tasks:
            for figure in figures(run_task(model, self._tokenizer, task.items)):
                scores[f"{task.name}_{figure.name}"] = figure.value
        return scores
