"""FinetuningConfig: how a pretrained model is put to a task. It knows neither the model nor where data and results stand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpt_config.errors import ConfigError
from gpt_config.training_config import PRECISIONS, TrainingConfig
from gpt_config.validation import check_bool, check_choice, check_real, check_seed, check_text, check_whole, plain_numbers

# The learning rate of each task if none is given: that of all weights, and that of an adapter or a last block alone.
_LEARNING_RATES = {"text": (2e-4, 1e-3), "classification": (5e-4, 1e-3), "instruction": (3e-4, 1e-3)}
TASKS = tuple(_LEARNING_RATES)
TRAINABLE = ("all", "last_block")
TOO_LONG = ("truncate", "drop")


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig:
    """One fine-tuning; every field is validated on construction.

    >>> FinetuningConfig(task="instruction", epochs=2).training_config(n_rows=1000, context=256).max_steps
    125
    """

    task: str = "text"
    epochs: float = 3.0  # how often the data is gone through
    max_steps: int = 0  # instead of epochs; 0: as many as they take
    batch_size: int = 16  # rows in each step, over all processes together
    context: int = 0  # tokens that a row has at most; 0: as many as the model has positions
    learning_rate: float = 0.0  # the highest, after a twentieth of the steps; 0: one that suits the task
    weight_decay: float = 0.01
    dropout: float = 0.1
    patience: int = 4  # evaluations in a row without a better loss, after which the run ends; 0: it goes to the end
    evaluations_per_epoch: int = 2
    validation_fraction: float = 0.1
    seed: int = 0

    # What learns
    trainable: str = "all"  # or the last block, with the norm behind it
    lora_rank: int = 0  # 0: no adapters
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0

    # Classification
    text_column: str = "text"
    label_column: str = "label"
    test_fraction: float = 0.1
    balance: bool = False  # every label weighs as much as any other

    # Instructions
    template: str = "default"  # a name, a JSON file, or a model's folder
    too_long: str = "truncate"  # what becomes of an example that is longer than the context; or it is dropped

    # How it is computed
    precision: str = "auto"
    accumulation: int = 1
    gradient_checkpointing: bool = False
    skip_bad: bool = False  # leave rows out that cannot be used, and count them, instead of ending with an error
    sample_prompt: str = ""
    sample_tokens: int = 60

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_choice("task", self.task, TASKS)
        check_choice("trainable", self.trainable, TRAINABLE)
        check_choice("too_long", self.too_long, TOO_LONG)
        check_choice("precision", self.precision, PRECISIONS)
        check_real("epochs", self.epochs, lambda value: value > 0, "a number above 0")
        for name in ("batch_size", "evaluations_per_epoch", "accumulation"):
            check_whole(name, getattr(self, name), 1)
        for name in ("max_steps", "context", "patience", "lora_rank", "sample_tokens"):
            check_whole(name, getattr(self, name), 0)
        check_seed(self.seed)
        for name in ("learning_rate", "weight_decay"):
            check_real(name, getattr(self, name), lambda value: value >= 0, "a number of 0 or more")
        check_real("lora_alpha", self.lora_alpha, lambda value: value > 0, "a number above 0")
        for name in ("dropout", "lora_dropout"):
            check_real(name, getattr(self, name), lambda value: 0 <= value < 1, "between 0 and 1, and below 1")
        check_real("validation_fraction", self.validation_fraction, lambda f: 0 < f < 1, "between 0 and 1")
        check_real("test_fraction", self.test_fraction, lambda f: 0 <= f < 1, "0, or between 0 and 1")
        for name in ("balance", "gradient_checkpointing", "skip_bad"):
            check_bool(name, getattr(self, name))
        for name in ("text_column", "label_column", "template", "sample_prompt"):
            check_text(name, getattr(self, name))
        if self.validation_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} leave nothing "
                "to learn from: together they must be below 1",
                field="validation_fraction",
                other_fields=("test_fraction",),
            )
        if self.text_column == self.label_column:
            raise ConfigError(
                f"text_column={self.text_column!r} is label_column too: name two columns",
                field="text_column",
                other_fields=("label_column",),
            )
        if self.lora_rank and self.trainable != "all":
            raise ConfigError(
                f"lora_rank={self.lora_rank} trains adapters alone: leave out trainable={self.trainable}",
                field="lora_rank",
                other_fields=("trainable",),
            )

    def training_config(self, *, n_rows: int, context: int) -> TrainingConfig:
        """The training that goes through `n_rows` rows `epochs` times."""
        parts = self.accumulation
        batch_size = min(self.batch_size, max(parts, n_rows // parts * parts))
        per_epoch = n_rows / batch_size
        max_steps = self.max_steps or max(1, math.ceil(self.epochs * per_epoch))
        eval_interval = max(1, min(max_steps, math.ceil(per_epoch / self.evaluations_per_epoch)))
        whole, part = _LEARNING_RATES[self.task]
        rate = self.learning_rate or (part if self.lora_rank or self.trainable != "all" else whole)
        return TrainingConfig(
            batch_size=batch_size, context=context, max_steps=max_steps, seed=self.seed, patience=self.patience,
            learning_rate=rate, min_learning_rate=rate / 10, warmup_steps=max_steps // 20, weight_decay=self.weight_decay,
            beta2=0.999, precision=self.precision, accumulation=self.accumulation,
            gradient_checkpointing=self.gradient_checkpointing, eval_interval=eval_interval,
            checkpoint_interval=eval_interval, log_interval=max(1, min(10, eval_interval)),
            sample_prompt=self.sample_prompt, sample_tokens=self.sample_tokens,
        )  # fmt: skip
