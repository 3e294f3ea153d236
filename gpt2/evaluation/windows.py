"""Windows over a text of any length and the model's predictions in them, each token once. It knows ids, not text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.fast.threads import step
from gpt2.model import GPT2
from gpt_config.errors import ConfigError
from gpt_config.validation import check_whole

_ROWS = 1024  # rows of logits in memory at once


class Window(NamedTuple):
    """Input ids and, shifted by one, their targets. Only the last `n_scored` targets are scored in this window."""

    ids: list[int]
    n_scored: int


def windows(ids: Iterable[int], context: int, stride: int) -> Iterator[Window]:
    """Windows of at most `context` inputs, in which each token of `ids` except the first is scored exactly once.

    The last window is moved back so that it is as long as the others, and its tokens have as much context.
    """
    ids = iter(ids)
    held = list(islice(ids, context + 1))
    if len(held) > 1:
        yield Window(held, len(held) - 1)
    while new := list(islice(ids, stride)):
        held = held[len(new) :] + new
        yield Window(held, len(new))


def predictions(
    model: GPT2, ids: Iterable[int], *, context: int | None = None, stride: int | None = None, batch_size: int = 8
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (R, V), in float32 or wider, and the targets (R,) that they predict: all `ids` except the first, in order.

    Windows of `context` tokens (default: all positions of the model) advance by `stride` (default: a full window), so every
    token except those at the start has at least `context - stride` tokens before it. `ids` may be a stream: tokens are not
    kept once they are scored. ConfigError if a size is invalid. Iterate under `torch.inference_mode`.
    """
    context = model.config.n_positions if context is None else context
    stride = context if stride is None else stride
    check_whole("context", context, 1)
    check_whole("stride", stride, 1)
    check_whole("batch_size", batch_size, 1)
    if context > model.config.n_positions:
        raise ConfigError(
            f"context={context} is longer than the {model.config.n_positions} positions of this model: choose fewer tokens",
            field="context",
        )
    if stride > context:
        raise ConfigError(
            f"stride={stride} is longer than context={context}, so tokens would not be scored: choose at most {context}",
            field="stride",
            other_fields=("context",),
        )
    all_windows = windows(ids, context, stride)
    # A window is shorter than `context` only if the text has no other, so all windows of a batch have the same length.
    while batch := list(islice(all_windows, min(batch_size, sys.maxsize))):
        yield from _predictions_of(model, batch)


def _predictions_of(model: GPT2, batch: list[Window]) -> Iterator[tuple[Tensor, Tensor]]:
    ids = torch.tensor([window.ids for window in batch], device=model.device)  # (B, T + 1)
    with step((id(model), "windows", len(batch)), model.device):
        hidden = model.hidden_states(ids[:, :-1])  # (B, T, C)
    places = torch.arange(hidden.shape[1], device=ids.device)
    n_scored = torch.tensor([window.n_scored for window in batch], device=ids.device)
    is_new = places >= hidden.shape[1] - n_scored[:, None]  # (B, T)
    for states, targets in zip(hidden[is_new].split(_ROWS), ids[:, 1:][is_new].split(_ROWS), strict=True):
        with step((id(model), "logits"), model.device, work=len(states)):
            logits = at_least_float32(model.logits(states))
        yield logits, targets


def at_least_float32(logits: Tensor) -> Tensor:
    """`logits` in float32, or in their own dtype if it is wider: precise enough for a softmax over a vocabulary."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
