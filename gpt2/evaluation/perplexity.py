"""Loss, perplexity, bits per byte and accuracy of a model on a text. It knows token ids, not files.

A text longer than the model's context is scored in windows, each token exactly once. The text is streamed, so memory does
not limit its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gpt2.dropout import in_mode
from gpt2.evaluation.figures import bounded_exp, check_not_nan
from gpt2.evaluation.windows import predictions
from gpt2.model import GPT2
from gpt_config.errors import DataError


@dataclass(frozen=True)
class Evaluation:
    """The result for one text. `loss` is the mean cross-entropy over `n_tokens` scored tokens, in nats."""

    loss: float
    accuracy: float  # share of tokens to which the model gives the highest probability, 0 to 1
    n_tokens: int
    n_bytes: int | None = None  # of the text in UTF-8; None if only its tokens are known
    n_words: int | None = None  # None if unknown

    @property
    def perplexity(self) -> float:
        """Per token: exp(loss)."""
        return bounded_exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to encode one byte of the text, comparable between tokenizers; None without `n_bytes`."""
        return self.loss * self.n_tokens / math.log(2) / self.n_bytes if self.n_bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """Per word: exp(total loss / number of words); None without `n_words`. Radford et al. 2019, section 3.1."""
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
    """The loss and accuracy over every token of `ids` except the first.

    The first token has no context, so let it be the end-of-text token. Windows of `context` tokens (default: all positions
    of the model) advance by `stride` (default: a full window), so every token except those at the start has at least
    `context - stride` tokens before it. `progress` is called with the number of tokens scored since its last call.
    Dropout is off in either mode of the model. DataError if there are fewer than two tokens; ConfigError if a size is
    invalid; CheckpointError if the model computes NaN.
    """
    total, right, n_tokens = 0.0, 0, 0
    with in_mode(model, is_training=False):
        for logits, targets in predictions(model, ids, context=context, stride=stride, batch_size=batch_size):
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            check_not_nan(total)
            right += int((logits.argmax(-1) == targets).sum())
            n_tokens += len(targets)
            progress(len(targets))
    if n_tokens == 0:
        raise DataError("the text has fewer than two tokens, so there is nothing to predict: give more text")
    return Evaluation(total / n_tokens, right / n_tokens, n_tokens)
