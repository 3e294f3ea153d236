"""FinetuningConfig: how a pretrained model is fine-tuned. It knows neither the model nor the paths of data and results."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpt_config.errors import ConfigError
from gpt_config.new_tokens import NEW_ROWS, new_tokens
from gpt_config.training_config import KEEP, MAX_STEPS, MOST, MOST_SAMPLED, PRECISIONS, SCHEDULES, TrainingConfig
from gpt_config.validation import check_bool, check_choice, check_real, check_seed, check_text, check_whole, plain_numbers

# The default learning rates of each task: for all weights, and for an adapter or the last block.
_LEARNING_RATES = {
    "text": (2e-4, 1e-3),
    "classification": (5e-4, 1e-3),
    "instruction": (3e-4, 1e-3),
    "preference": (5e-6, 1e-4),
}
TASKS = tuple(_LEARNING_RATES)
TRAINABLE = ("all", "last_block")
TOO_LONG = ("truncate", "drop")
# What the outputs of a classifier mean: one label for each text, any number of labels, or a number. transformers' names.
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig:
    """One fine-tuning run; every field is validated on construction.

    >>> FinetuningConfig(task="instruction", epochs=2).training_config(n_rows=1000, context=256).max_steps
    125
    """

    task: str = "text"
    epochs: float = 3.0  # passes over the data
    max_steps: int = 0  # overrides `epochs`; 0: computed from `epochs`
    batch_size: int = 16  # rows per step, over all processes
    context: int = 0  # maximum tokens per row; 0: the model's number of positions
    learning_rate: float = 0.0  # the maximum, reached after 5% of the steps; 0: the default of the task
    schedule: str = "cosine"  # of the learning rate: see TrainingConfig; the last step has a tenth of it
    weight_decay: float = 0.01
    dropout: float = 0.1
    patience: int = 4  # stop after this many evaluations in a row without a lower loss; 0: no early stopping
    evaluations_per_epoch: int = 2
    keep: str = "best"  # the model in the run's folder: see TrainingConfig
    validation_fraction: float = 0.1
    seed: int = 0

    # New special tokens, a tuple or a text with commas, and their rows of the embedding: mean (of the others) or random
    add_tokens: tuple[str, ...] = ()
    new_rows: str = "mean"

    # Trained parameters
    trainable: str = "all"  # or "last_block": the last block and the final layer norm
    lora_rank: int = 0  # 0: no adapters
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0

    # Texts
    text_field: str = "text"  # of records: the field with the text
    special_tokens: bool = False  # special tokens that a text spells become tokens

    # Classification
    problem_type: str = "single_label_classification"  # or another of PROBLEM_TYPES
    text_column: str = "text"
    label_column: str = "label"
    test_fraction: float = 0.1
    balance: bool = False  # give every label the same weight, however many examples it has

    # Instructions
    template: str = "default"  # a name, a JSON file, or the folder of a model
    too_long: str = "truncate"  # examples longer than the context: "truncate" or "drop"

    # Preferences
    beta: float = 0.1  # of DPO: how strongly the model stays near the one that the run began with

    # Computation
    precision: str = "auto"
    accumulation: int = 1
    gradient_checkpointing: bool = False
    skip_bad: bool = False  # skip and count unusable rows instead of raising an error
    sample_prompt: str = ""
    sample_tokens: int = 60

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_choice("task", self.task, TASKS)
        check_choice("trainable", self.trainable, TRAINABLE)
        check_choice("too_long", self.too_long, TOO_LONG)
        check_choice("problem_type", self.problem_type, PROBLEM_TYPES)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("keep", self.keep, KEEP)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("new_rows", self.new_rows, NEW_ROWS)
        object.__setattr__(self, "add_tokens", new_tokens(self.add_tokens))
        check_real("epochs", self.epochs, lambda value: 0 < value <= MAX_STEPS, f"a number above 0, at most {MAX_STEPS}")
        for name in ("batch_size", "evaluations_per_epoch", "accumulation"):
            check_whole(name, getattr(self, name), 1, maximum=MOST, limit="no run has more")
        for name in ("context", "patience", "lora_rank"):
            check_whole(name, getattr(self, name), 0, maximum=MOST, limit="no run has more")
        check_whole("sample_tokens", self.sample_tokens, 0, maximum=MOST_SAMPLED, limit="each evaluation waits for them")
        check_whole("max_steps", self.max_steps, 0, maximum=MAX_STEPS, limit="names of checkpoints have eight digits")
        check_seed(self.seed)
        for name in ("learning_rate", "weight_decay"):
            check_real(name, getattr(self, name), lambda value: value >= 0, "a number of 0 or more")
        check_real("beta", self.beta, lambda beta: 0 < beta <= 1000, "above 0, at most 1000")
        check_real("lora_alpha", self.lora_alpha, lambda value: value > 0, "a number above 0")
        for name in ("dropout", "lora_dropout"):
            check_real(name, getattr(self, name), lambda value: 0 <= value < 1, "at least 0 and below 1")
        check_real("validation_fraction", self.validation_fraction, lambda f: 0 < f < 1, "above 0 and below 1")
        check_real("test_fraction", self.test_fraction, lambda f: 0 <= f < 1, "at least 0 and below 1")
        for name in ("balance", "gradient_checkpointing", "skip_bad", "special_tokens"):
            check_bool(name, getattr(self, name))
        for name in ("text_field", "text_column", "label_column", "template", "sample_prompt"):
            check_text(name, getattr(self, name))
        if self.validation_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} leave no training "
                "data: their sum must be below 1",
                field="validation_fraction",
                other_fields=("test_fraction",),
            )
        if self.text_column == self.label_column:
            raise ConfigError(
                f"text_column={self.text_column!r} is also label_column: name two different columns",
                field="text_column",
                other_fields=("label_column",),
            )
        if self.balance and self.problem_type != PROBLEM_TYPES[0]:
            raise ConfigError(
                f"balance=True needs one label for each text: leave it out, or use problem_type={PROBLEM_TYPES[0]}",
                field="balance",
                other_fields=("problem_type",),
            )
        if self.add_tokens and (self.trainable != "all" or self.task == "classification"):
            reason = "a classifier" if self.task == "classification" else f"trainable={self.trainable}"
            raise ConfigError(
                f"add_tokens={','.join(self.add_tokens)} would not be learned by {reason}: leave it out", field="add_tokens"
            )
        if self.lora_rank and self.trainable != "all":
            raise ConfigError(
                f"lora_rank={self.lora_rank} trains only adapters: remove trainable={self.trainable}",
                field="lora_rank",
                other_fields=("trainable",),
            )

    def training_config(self, *, n_rows: int, context: int, n_processes: int = 1) -> TrainingConfig:
        """The training run with `epochs` passes over `n_rows` rows, or with `max_steps` steps if that is set.

        If there are fewer rows than `batch_size`, a step has as many of them as `n_processes` can share evenly. ConfigError
        if the passes have too many steps.
        """
        parts = self.accumulation * n_processes
        batch_size = min(self.batch_size, max(parts, n_rows // parts * parts))
        per_epoch = n_rows / batch_size
        if not self.max_steps and self.epochs * per_epoch > MAX_STEPS:
            raise ConfigError(
                f"epochs={self.epochs} over {n_rows} rows are more than {MAX_STEPS} steps: choose fewer", field="epochs"
            )
        max_steps = self.max_steps or max(1, math.ceil(self.epochs * per_epoch))
        eval_interval = max(1, min(max_steps, math.ceil(per_epoch / self.evaluations_per_epoch)))
        whole, part = _LEARNING_RATES[self.task]
        rate = self.learning_rate or (part if self.lora_rank or self.trainable != "all" else whole)
        return TrainingConfig(
            batch_size=batch_size, context=context, max_steps=max_steps, seed=self.seed, patience=self.patience,
            learning_rate=rate, schedule=self.schedule, warmup_steps=max_steps // 20,
            weight_decay=self.weight_decay, keep=self.keep, beta2=0.999, precision=self.precision,
            accumulation=self.accumulation, gradient_checkpointing=self.gradient_checkpointing, eval_interval=eval_interval,
            checkpoint_interval=eval_interval, log_interval=max(1, min(10, eval_interval)),
            sample_prompt=self.sample_prompt, sample_tokens=self.sample_tokens,
        )  # fmt: skip
