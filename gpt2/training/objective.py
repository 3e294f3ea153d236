"""What a run learns: its batches, loss and metrics. Depends on the model and on token files, not on generation."""

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
    """Returns the batch of a step, or one process's share of its rows. It is a pure function of its arguments."""

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch: ...


class CountedBatches(TrainingBatches, Protocol):
    """The same batches in each evaluation, numbered from 0 to `count` - 1."""

    @property
    def count(self) -> int: ...

    def share(self, step: int) -> float:
        """The weight of a batch's mean loss in the loss of the evaluation. The weights of all batches add up to 1."""
        ...


class Objective(abc.ABC):
    """Data, loss and evaluation of a run. What is saved is not part of it: see `Outputs`.

    A batch is a tuple of arrays with one row per example; the first array is the input ids (rows, tokens). The trainer may
    divide a batch into parts of equal size, so the mean of the losses of the parts must be the loss of the whole batch.
    """

    batches: TrainingBatches
    evaluation: CountedBatches
    tokens_per_step: float  # on average, padding included

    def check(self, model: GPT2Config, config: TrainingConfig) -> None:  # noqa: B027 (optional)
        """Raise ConfigError if the data does not fit the model. By default, do nothing."""

    @abc.abstractmethod
    def loss(self, model: GPT2) -> nn.Module:
        """Return a module that contains `model` and everything else that is trained.

        Called with a batch, the module returns the mean loss in nats.
        """

    @abc.abstractmethod
    def figures(self, loss: float) -> dict[str, float]:
        """Return other metrics by name, for a validation `loss` in nats."""


class LanguageModelling(Objective):
    """Predict the next token at every position of a text."""

    def __init__(self, data: TrainingData, config: TrainingConfig) -> None:
        self.data = data
        rows = (config.context, config.batch_size, config.seed)
        self.batches = Batches(data.train, *rows)
        self.evaluation = EvaluationBatches(data.validation, *rows, limit=config.eval_batches)
        self.tokens_per_step = config.tokens_per_step

    def check(self, model: GPT2Config, config: TrainingConfig) -> None:
        if config.context > model.n_positions:
            raise ConfigError(
                f"context={config.context} is longer than the {model.n_positions} positions of the model: use at most "
                f"{model.n_positions}"
            )
        if self.data.train.vocab_size <= model.vocab_size:
            return
        # A tokenizer may have more ids than the model. Then only data that contains one of these ids is an error.
        largest = max(file.largest_id() for file in (self.data.train, self.data.validation))
        if largest >= model.vocab_size:
            raise ConfigError(
                f"the data has {self.data.train.vocab_size} token ids and the model {model.vocab_size}, and contains id "
                f"{largest}: encode it with the model's tokenizer"
            )

    def loss(self, model: GPT2) -> nn.Module:
        return LanguageModelLoss(model)

    def figures(self, loss: float) -> dict[str, float]:
        text = self.data.validation
        return {"perplexity": perplexity(loss), "bits_per_byte": bits_per_byte(loss, len(text), text.n_bytes)}


def perplexity(loss: float) -> float:
    """Return exp(loss). A loss above 700 counts as 700, because the result would overflow."""
    return math.exp(min(loss, 700))


def bits_per_byte(loss: float, n_tokens: int, n_bytes: int) -> float:
    """Return `loss` (nats per token) in bits per byte of text, a unit that does not depend on the tokenizer."""
    return loss / math.log(2) * n_tokens / max(n_bytes, 1)
