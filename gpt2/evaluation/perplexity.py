"""How surprised a model is by a text: loss, perplexity, bits per byte and accuracy. It knows tokens, not files.

A text longer than the model's context is scored in windows, and each token exactly once; the text streams through, so its
length is not bounded by memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.model import GPT2
from gpt_config.errors import ConfigError, DataError
from gpt_config.validation import check_whole

_ROWS = 1024  # rows of logits that are held at once


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text: `loss` is the mean over `n_tokens` tokens, in nats."""

    loss: float
    accuracy: float  # share of tokens that the model thought the most probable
    n_tokens: int
    n_bytes: int | None = None  # of the text as UTF-8; None where only its tokens are known
    n_words: int | None = None

    @property
    def perplexity(self) -> float:
        """Of a token: exp(loss)."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to encode a byte of the text: does not depend on how it is cut into tokens."""
        return self.loss * self.n_tokens / math.log(2) / self.n_bytes if self.n_bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """Of a word: the text's whole loss, shared among its words (Radford et al. 2019, section 3.1)."""
        return _exp(self.loss * self.n_tokens / self.n_words) if self.n_words else None


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


class _Window(NamedTuple):
    ids: list[int]  # inputs and, one place on, their targets
    n_scored: int  # how many of the targets are new; they are the last ones


@torch.inference_mode()
def evaluate(
    model: GPT2,
    ids: Iterable[int],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda n_tokens: None,
) -> Evaluation:
    """Score every token of `ids` but the first, which has nothing before it: let that be the end-of-text token.

    Windows of `context` tokens (by default all positions of the model) move on by `stride` (by default a whole window),
    so each token but those at the start has at least `context - stride` before it. `progress` is told of tokens done.
    DataError if there are fewer than two tokens; ConfigError for sizes that cannot be.
    """
    context = model.config.n_positions if context is None else context
    stride = context if stride is None else stride
    check_whole("context", context, 1)
    check_whole("stride", stride, 1)
    check_whole("batch_size", batch_size, 1)
    if context > model.config.n_positions:
        raise ConfigError(f"context={context} is longer than the {model.config.n_positions} positions of this model")
    if stride > context:
        raise ConfigError(f"stride={stride} is longer than context={context}: tokens between windows would not be scored")
    total, right, n_tokens = 0.0, 0, 0
    for batch in _batched(_windows(iter(ids), context, stride), batch_size):
        loss, correct = _score(model, batch)
        total, right = total + loss, right + correct
        n_scored = sum(window.n_scored for window in batch)
        n_tokens += n_scored
        progress(n_scored)
    if n_tokens == 0:
        raise DataError("the text has fewer than two tokens: there is nothing to predict")
    return Evaluation(total / n_tokens, right / n_tokens, n_tokens)


def _windows(ids: Iterator[int], context: int, stride: int) -> Iterator[_Window]:
    """The last window is moved back to be as long as the others, so that its tokens have as much before them."""
    held = list(islice(ids, context + 1))
    if len(held) > 1:
        yield _Window(held, len(held) - 1)
    while new := list(islice(ids, stride)):
        held = held[len(new) :] + new
        yield _Window(held, len(new))


def _batched(windows: Iterator[_Window], size: int) -> Iterator[list[_Window]]:
    """Only the only window of a short text is shorter than others, so all of a batch are as long."""
    while batch := list(islice(windows, size)):
        yield batch


def _score(model: GPT2, batch: list[_Window]) -> tuple[float, int]:
    """The summed loss of the new targets, in nats, and how many were the most probable token."""
    ids = torch.tensor([window.ids for window in batch], device=model.wte.weight.device)  # (B, T + 1)
    hidden = model.hidden_states(ids[:, :-1])  # (B, T, C)
    places = torch.arange(hidden.shape[1], device=ids.device)
    n_scored = torch.tensor([window.n_scored for window in batch], device=ids.device)
    is_new = places >= hidden.shape[1] - n_scored[:, None]  # (B, T)
    total, right = 0.0, 0
    for states, targets in zip(hidden[is_new].split(_ROWS), ids[:, 1:][is_new].split(_ROWS), strict=True):
        logits: Tensor = model.logits(states).float()
        total += F.cross_entropy(logits, targets, reduction="sum").double().item()
        right += int((logits.argmax(-1) == targets).sum())
    return total, right
