"""Windows over a text of any length, and what the model predicts in them: each token once. It knows ids, not text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.fast.threads import step
from gpt2.model import GPT2
from gpt_config.errors import ConfigError
from gpt_config.validation import check_whole

_ROWS = 1024  # rows of logits that are held at once


class Window(NamedTuple):
    """Inputs and, one place on, their targets; the last `n_scored` targets are new."""

    ids: list[int]
    n_scored: int


def windows(ids: Iterable[int], context: int, stride: int) -> Iterator[Window]:
    """All tokens of `ids` but the first, each as a new target of one window of at most `context` inputs.

    The last window is moved back to be as long as the others, so that its tokens have as much before them.
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
    """Logits (R, V), in float32 at least, and the targets (R,) that they predict: all of `ids` but the first, in order.

    Windows of `context` tokens (by default all positions of the model) move on by `stride` (by default a whole window),
    so each token but those at the start has at least `context - stride` before it. `ids` may stream: what was scored is
    not kept. ConfigError for sizes that cannot be. To be read under `torch.inference_mode`.
    """
    context = model.config.n_positions if context is None else context
    stride = context if stride is None else stride
    check_whole("context", context, 1)
    check_whole("stride", stride, 1)
    check_whole("batch_size", batch_size, 1)
    if context > model.config.n_positions:
        raise ConfigError(
            f"context={context} is longer than the {model.config.n_positions} positions of this model", field="context"
        )
    if stride > context:
        raise ConfigError(
            f"stride={stride} is longer than context={context}: tokens between windows would not be scored",
            field="stride",
            other_fields=("context",),
        )
    all_windows = windows(ids, context, stride)
    # Only the only window of a short text is shorter than others, so all of a batch are as long.
    while batch := list(islice(all_windows, batch_size)):
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
    """`logits` in a dtype in which a softmax over a vocabulary is exact enough."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
