"""What a run learns: its batches, its loss, and what it leaves behind. The loop and its engines know no more about it."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import nn

from gpt2.pretrained import GPT2
from gpt2.training.batches import Batches, EvaluationBatches
from gpt2.training.loss import LanguageModelLoss
from gpt2.training.preparation import TrainingData
from gpt_config.errors import ConfigError
from gpt_config.generation_config import GenerationConfig
from gpt_config.model_config import GPT2Config
from gpt_config.training_config import TrainingConfig
from gpt_encoder.interface import Tokenizer

Batch = tuple[NDArray[Any], ...]


def _save_pretrained(model: GPT2, folder: Path, tokenizer: Tokenizer) -> None:
    model.save_pretrained(folder, tokenizer=tokenizer)


class TrainingBatches(Protocol):
    """The batch of each step, or a process's share of its rows: a pure function of its arguments."""

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch: ...


class CountedBatches(TrainingBatches, Protocol):
    """The same batches each time, numbered from 0 to `count` - 1."""

    @property
    def count(self) -> int: ...


class Objective(abc.ABC):
    """What is learned in a run.

    A batch is a tuple of arrays with one row for each example, the first of them the input ids (rows, tokens). It may be
    done in parts of equally many rows: the mean of their losses must be the loss of the whole.
    """

    batches: TrainingBatches
    evaluation: CountedBatches
    tokens_per_step: float  # on average, padding included
    # How a model that can speak is saved; to be set where only an adapter is wanted.
    write_model: Callable[[GPT2, Path, Tokenizer], None] = staticmethod(_save_pretrained)

    def check(self, model: GPT2Config, config: TrainingConfig) -> None:  # noqa: B027 (most have nothing to add)
        """ConfigError if it does not fit the model."""

    @abc.abstractmethod
    def loss(self, model: GPT2) -> nn.Module:
        """A module that holds `model`, and whatever else is to learn; it makes a batch into the mean loss, in nats."""

    @abc.abstractmethod
    def figures(self, loss: float) -> dict[str, float]:
        """What else to tell of a validation loss, by name."""

    @abc.abstractmethod
    def sample(self, model: GPT2, config: TrainingConfig) -> str:
        """A text to show what has been learned so far, or none; `model` is in eval mode."""

    @abc.abstractmethod
    def save(self, model: GPT2, folder: Path) -> None:
        """Make `folder` what the run was for."""


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

    def sample(self, model: GPT2, config: TrainingConfig) -> str:
        from gpt2.generation.completion import complete

        tokenizer = self.data.tokenizer
        if not config.sample_prompt and tokenizer.eot_token_id is None:
            return ""
        options = GenerationConfig(max_new_tokens=config.sample_tokens, do_sample=True, temperature=0.8, seed=config.seed)
        return config.sample_prompt + complete(model, tokenizer, config.sample_prompt, options)[0].text

    def save(self, model: GPT2, folder: Path) -> None:
        self.write_model(model, folder, self.data.tokenizer)


def perplexity(loss: float) -> float:
    """exp(loss), or the largest that a float holds."""
    return math.exp(min(loss, 700))


def bits_per_byte(loss: float, n_tokens: int, n_bytes: int) -> float:
    """`loss` (nats a token) as bits a byte of text: a measure that does not depend on how text is cut into tokens."""
    return loss / math.log(2) * n_tokens / max(n_bytes, 1)
