"""How surprised a model is by a text: loss, perplexity, bits per byte and accuracy. It knows tokens, not files.

A text longer than the model's context is scored in windows, and each token exactly once; the text streams through, so its
length is not bounded by memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gpt2.evaluation.figures import bounded_exp
from gpt2.evaluation.windows import predictions
from gpt2.model import GPT2
from gpt_config.errors import DataError


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
        return bounded_exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to encode a byte of the text: does not depend on how it is cut into tokens."""
        return self.loss * self.n_tokens / math.log(2) / self.n_bytes if self.n_bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """Of a word: the text's whole loss, shared among its words (Radford et al. 2019, section 3.1)."""
        return bounded_exp(self.loss * self.n_tokens / self.n_words) if self.n_words else None


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
    total, right, n_tokens = 0.0, 0, 0
    for logits, targets in predictions(model, ids, context=context, stride=stride, batch_size=batch_size):
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
        n_tokens += len(targets)
        progress(len(targets))
    if n_tokens == 0:
        raise DataError("the text has fewer than two tokens: there is nothing to predict")
    return Evaluation(total / n_tokens, right / n_tokens, n_tokens)
