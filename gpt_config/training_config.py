"""TrainingConfig: how a model is trained. It knows neither the model's shape nor the paths of data and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt_config.errors import ConfigError
from gpt_config.validation import check_bool, check_choice, check_real, check_seed, check_text, check_whole, plain_numbers

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
SHARDINGS = ("ddp", "fsdp")
KEEP = ("best", "last", "both")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
DECAY_SHAPES = ("sqrt", "linear", "cosine")
LOGS = ("jsonl", "tensorboard", "wandb")  # of a run; jsonl is always written

MAX_STEPS = 10**8 - 1  # the names of checkpoints have eight digits
MOST = 10**12  # of anything else that is counted; a product of several such numbers can still be written out
MOST_SAMPLED = 10_000  # tokens of a sample, for which each evaluation waits
_WARMUP, _WARMUP_SHARE = 100, 20  # the default warm-up: 100 steps, but not more than 1/20 of the run
_DECAY_SHARE = 5  # the default decay of schedule=wsd: 1/5 of the run (Hagele et al. 2024 recommend 10-20%)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run; every field is validated on construction. Sizes are totals over all processes.

    >>> TrainingConfig(max_steps=100, warmup_steps=10, learning_rate=1e-3).tokens_per_step
    16384
    """

    # Batches
    batch_size: int = 64  # rows of `context` tokens per step
    context: int = 256  # tokens per row
    accumulation: int = 1  # parts into which each process splits its rows; more parts need less memory
    max_steps: int = 2000

    # AdamW (Loshchilov & Hutter 2017), or Muon for the matrices of the blocks and AdamW for the rest. The learning rate
    # rises linearly for `warmup_steps`, then follows `schedule`.
    optimizer: str = "adamw"  # or muon
    learning_rate: float = 1e-3
    schedule: str = "cosine"  # or linear, constant, wsd: constant, and lower only in the last `decay_steps`
    min_learning_rate: float | None = None  # of the last step; None: `min_learning_rate_share` of `learning_rate`
    min_learning_rate_share: float | None = None  # None: a tenth; one of the two fields may be set
    warmup_steps: int | None = None  # None: 100, or 5% of `max_steps` if that is less
    decay_steps: int | None = None  # of schedule=wsd; None: 20% of `max_steps`
    decay_shape: str = "sqrt"  # of schedule=wsd: sqrt (the highest rate times 1 - sqrt(part)), linear or cosine
    weight_decay: float = 0.1  # applies to matrices only, not to biases and layer norms
    beta1: float = 0.9
    beta2: float = 0.99
    momentum: float = 0.95  # of Muon
    clip_norm: float = 1.0  # maximum norm of the gradient; 0: no clipping
    ema: float = 0.0  # decay of the moving average of the weights, which is evaluated and saved; 0: the weights themselves

    # Distillation: the temperature of teacher and student, and the share of the teacher's part in the loss
    temperature_of_teacher: float = 2.0
    teacher_share: float = 0.5

    # Computation
    precision: str = "auto"  # dtype of the matrix products; auto: bfloat16 if it is faster on this machine
    compile: bool = False  # torch.compile: half a minute at the start, then faster steps
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    sharding: str = "ddp"  # with several processes: each has the whole model (ddp) or a shard of it (fsdp)
    seed: int = 0

    # Evaluations, checkpoints and logs; intervals are in steps
    eval_interval: int = 250
    patience: int = 0  # stop after this many evaluations in a row without a lower loss; 0: no early stopping
    eval_batches: int = 20  # batches per evaluation, spread over the validation text
    checkpoint_interval: int = 250
    keep: str = "best"  # the model in the run's folder: best or last; both: the best, and the last in its folder "last"
    log_interval: int = 10
    sample_prompt: str = ""  # start of the sample at each evaluation; empty: a new document
    sample_tokens: int = 100  # 0: no samples

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_whole("max_steps", self.max_steps, 1, maximum=MAX_STEPS, limit="names of checkpoints have eight digits")
        for name in ("batch_size", "context", "accumulation", "eval_interval", "eval_batches"):
            check_whole(name, getattr(self, name), 1, maximum=MOST, limit="no run has more")
        for name in ("checkpoint_interval", "log_interval"):
            check_whole(name, getattr(self, name), 1, maximum=MOST, limit="no run has more")
        check_whole("patience", self.patience, 0, maximum=MOST, limit="no run has more")
        check_whole("sample_tokens", self.sample_tokens, 0, maximum=MOST_SAMPLED, limit="each evaluation waits for them")
        check_seed(self.seed)
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            check_real(name, getattr(self, name), lambda value: value >= 0, "a number of 0 or more")
        self._check_schedule()
        for name in ("beta1", "beta2", "momentum", "ema"):
            check_real(name, getattr(self, name), lambda value: 0 <= value < 1, "at least 0 and below 1")
        check_real("temperature_of_teacher", self.temperature_of_teacher, lambda t: 0 < t <= 100, "above 0, at most 100")
        check_real("teacher_share", self.teacher_share, lambda share: 0 <= share <= 1, "at least 0 and at most 1")
        check_bool("compile", self.compile)
        check_bool("gradient_checkpointing", self.gradient_checkpointing)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("sharding", self.sharding, SHARDINGS)
        check_choice("keep", self.keep, KEEP)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("decay_shape", self.decay_shape, DECAY_SHAPES)
        check_text("sample_prompt", self.sample_prompt)
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size={self.batch_size} cannot be split into accumulation={self.accumulation} equal parts: "
                "choose a multiple",
                field="batch_size",
                other_fields=("accumulation",),
            )

    def _check_schedule(self) -> None:
        """Raise ConfigError for two floors, for one above the peak, and for a warm-up and decay longer than the run."""
        share = self.min_learning_rate_share
        if share is not None:
            check_real("min_learning_rate_share", share, lambda value: 0 <= value <= 1, "at least 0 and at most 1")
            if self.min_learning_rate is not None:
                raise ConfigError(
                    f"min_learning_rate_share={share} and min_learning_rate={self.min_learning_rate} both set the rate of "
                    "the last step: leave one of them out",
                    field="min_learning_rate_share",
                    other_fields=("min_learning_rate",),
                )
        if self.min_learning_rate is not None:
            check_real("min_learning_rate", self.min_learning_rate, lambda value: value >= 0, "a number of 0 or more")
            if self.min_learning_rate > self.learning_rate:
                raise ConfigError(
                    f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}, so the rate "
                    "would rise: choose a smaller one, or leave it out for a tenth of learning_rate",
                    field="min_learning_rate",
                    other_fields=("learning_rate",),
                )
        if self.warmup_steps is not None:
            check_whole("warmup_steps", self.warmup_steps, 0)
            if self.warmup_steps > self.max_steps:
                raise ConfigError(
                    f"warmup_steps={self.warmup_steps} is longer than the run of max_steps={self.max_steps}: choose fewer, "
                    "or leave it out for 5% of the run",
                    field="warmup_steps",
                    other_fields=("max_steps",),
                )
        if self.decay_steps is not None:
            check_whole("decay_steps", self.decay_steps, 0)
            if self.schedule == "wsd" and self.decay_steps + self.n_warmup > self.max_steps:
                raise ConfigError(
                    f"decay_steps={self.decay_steps} after {self.n_warmup} steps of warm-up are more than max_steps="
                    f"{self.max_steps}: choose fewer, or leave it out for 20% of the run",
                    field="decay_steps",
                    other_fields=("max_steps",),
                )

    @property
    def lowest_rate(self) -> float:
        """The learning rate at the end of the run: `min_learning_rate`, or a share of the highest; that one if constant."""
        if self.schedule == "constant":
            return self.learning_rate
        if self.min_learning_rate is not None:
            return self.min_learning_rate
        share = self.min_learning_rate_share
        return self.learning_rate / 10 if share is None else self.learning_rate * share

    @property
    def n_warmup(self) -> int:
        """The number of steps in which the learning rate rises: `warmup_steps`, or its default."""
        return min(_WARMUP, self.max_steps // _WARMUP_SHARE) if self.warmup_steps is None else self.warmup_steps

    @property
    def n_decay(self) -> int:
        """The number of steps in which the learning rate of schedule=wsd falls: `decay_steps`, or its default."""
        if self.decay_steps is not None:
            return self.decay_steps
        return min(self.max_steps // _DECAY_SHARE, self.max_steps - self.n_warmup)

    @property
    def tokens_per_step(self) -> int:
        """Training tokens per step, over all processes."""
        return self.batch_size * self.context

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-serializable mapping."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainingConfig:
        """The config with these fields. Raises ConfigError for an unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ConfigError(
                f"{unknown[0]} is not a field of TrainingConfig: use one of {', '.join(sorted(known))}", field=unknown[0]
            )
        return cls(**fields)
