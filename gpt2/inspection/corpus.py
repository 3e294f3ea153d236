"""The texts of a corpus that excite a neuron the most. It depends on traces, and takes any iterable of texts or ids."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from gpt2.inspection.names import checked_index, select_layers, select_names
from gpt2.inspection.taps import checked
from gpt2.inspection.tracing import rows_of, tokenizer_for, trace
from gpt2.model import GPT2
from gpt_config.validation import check_whole
from gpt_encoder.interface import Tokenizer


class Excitement(NamedTuple):
    """Where a text excites a neuron the most: the activation, the number of the text, the token's position, all ids."""

    value: float
    text: int
    position: int
    ids: list[int]
    values: list[float]  # the activation at each token


def most_exciting(
    model: GPT2,
    texts: Iterable[str] | Iterable[Sequence[int]],
    layer: int,
    neuron: int,
    k: int = 10,
    *,
    name: str = "mlp.hook_post",
    batch_size: int = 16,
    tokenizer: Tokenizer | None = None,
) -> list[Excitement]:
    """Return the `k` texts with the largest activation of a neuron, the largest first, each text once.

    `texts` may be of any number; each is a text or ids, and is cut to the model's context. `name` is an activation (B, T, N)
    of a block, of which `neuron` is an element, such as `hook_resid_post` for a direction of the stream.
    """
    check_whole("k", k, 1)
    check_whole("batch_size", batch_size, 1)
    (layer,) = select_layers(len(checked(model).h), layer)
    (full,) = select_names(len(model.h), f"blocks.{layer}.{name}")
    rows = enumerate(_rows(model, texts, tokenizer))
    return heapq.nlargest(k, _excitements(model, rows, full, neuron, batch_size), key=lambda one: one.value)


def _rows(model: GPT2, texts: Iterable[object], tokenizer: Tokenizer | None) -> Iterator[list[int]]:
    """The ids of each text that the model can see."""
    for text in texts:
        if isinstance(text, str) and tokenizer is None:
            tokenizer = tokenizer_for(model)
        (ids,) = rows_of(model, text, tokenizer)
        yield ids[: model.config.n_positions]


def _excitements(
    model: GPT2, rows: Iterator[tuple[int, list[int]]], name: str, neuron: int, batch_size: int
) -> Iterator[Excitement]:
    while batch := [(number, ids) for number, ids in islice(rows, batch_size) if ids]:
        activation = trace(model, [ids for _, ids in batch], name)[name]
        place = checked_index(neuron, activation.shape[-1], "neurons")
        for (number, ids), values in zip(batch, activation[:, :, place].tolist(), strict=True):
            values = values[: len(ids)]
            value = max(values)
            yield Excitement(value, number, values.index(value), ids, values)
