"""What a run learns: its batches, its loss, and how well it does. It knows neither model files nor generation."""

from __future__ import annotations

import abc
import math
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import nn

from gpt2.model import GPT2
from gpt2.training.batches import Batches, EvaluationBatches
from gpt2.training.loss import LanguageModelLoss
from gpt2.training.preparation import TrainingData
from gpt_config.errors import ConfigError
from gpt_config.model_config import GPT2Config
from gpt_config.training_config import TrainingConfig

Batch = tuple[NDArray[Any], ...]


class TrainingBatches(Protocol):
    """The batch of each step, or a process's share of its rows: a pure function of its arguments."""

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch: ...


class CountedBatches(TrainingBatches, Protocol):
    """The same batches each time, numbered from 0 to `count` - 1."""

    @property
    def count(self) -> int: ...


class Objective(abc.ABC):
    """Data, loss and evaluation of a run. What becomes of the model is not part of it: see `Outputs`.

    A batch is a tuple of arrays with one row for each example; the first array is the input ids (rows, tokens). The trainer
    may compute it in parts of equal size: the mean of their losses must be the loss of the whole batch.
    """

    batches: TrainingBatches
    evaluation: CountedBatches
    tokens_per_step: float  # on average, padding included

    def check(self, model: GPT2Config, config: TrainingConfig) -> None:  # noqa: B027 (most have nothing to add)
        """ConfigError if it does not fit the model."""

    @abc.abstractmethod
    def loss(self, model: GPT2) -> nn.Module:
        """A module that contains `model` and everything else that learns; called with a batch, it gives the mean loss in
        nats."""

    @abc.abstractmethod
    def figures(self, loss: float) -> dict[str, float]:
        """Further figures for a validation loss (in nats), by name."""


class LanguageModelling(Objective):
    """The next token of a text, everywhere in it."""

    def __init__(self, data: TrainingData, config: TrainingConfig) -> None:
        self.data = data
        rows = (config.context, config.batch_size, config.seed)
        self.batches = Batches(data.train, *rows)
        self.evaluation = EvaluationBatches(data.validation, *rows, limit=config.eval_batches)
        self.tokens_per_step = config.tokens_per_step

    def check(self, model: GPT2Config, config: TrainingConfig) -> None:
        if config.context > model.n_positions:
            raise ConfigError(f"context={config.context} is longer than the {model.n_positions} positions of the model")
        if self.data.train.vocab_size > model.vocab_size:
            raise ConfigError(
                f"the data has {self.data.train.vocab_size} token ids and the model {model.vocab_size}: "
                "encode it with the model's tokenizer"
            )

    def loss(self, model: GPT2) -> nn.Module:
        return LanguageModelLoss(model)

    def figures(self, loss: float) -> dict[str, float]:
        text = self.data.validation
        return {"perplexity": perplexity(loss), "bits_per_byte": bits_per_byte(loss, len(text), text.n_bytes)}


def perplexity(loss: float) -> float:
    """exp(loss), or the largest that a float holds."""
    return math.exp(min(loss, 700))


def bits_per_byte(loss: float, n_tokens: int, n_bytes: int) -> float:
    """`loss` (nats per token) as bits per byte of text, which do not depend on the tokenizer."""
    return loss / math.log(2) * n_tokens / max(n_bytes, 1)
