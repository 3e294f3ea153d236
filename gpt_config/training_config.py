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

    # AdamW (Loshchilov & Hutter 2017). The learning rate rises linearly for `warmup_steps`, then follows a cosine down.
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1  # applies to matrices only, not to biases and layer norms
    beta1: float = 0.9
    beta2: float = 0.99
    clip_norm: float = 1.0  # maximum norm of the gradient; 0: no clipping

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
    log_interval: int = 10
    sample_prompt: str = ""  # start of the sample at each evaluation; empty: a new document
    sample_tokens: int = 100  # 0: no samples

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in ("batch_size", "context", "accumulation", "max_steps", "eval_interval", "eval_batches"):
            check_whole(name, getattr(self, name), 1)
        check_whole("checkpoint_interval", self.checkpoint_interval, 1)
        check_whole("log_interval", self.log_interval, 1)
        for name in ("warmup_steps", "sample_tokens", "patience"):
            check_whole(name, getattr(self, name), 0)
        check_seed(self.seed)
        for name in ("learning_rate", "min_learning_rate", "weight_decay", "clip_norm"):
            check_real(name, getattr(self, name), lambda value: value >= 0, "a number of 0 or more")
        for name in ("beta1", "beta2"):
            check_real(name, getattr(self, name), lambda value: 0 <= value < 1, "at least 0 and below 1")
        check_bool("compile", self.compile)
        check_bool("gradient_checkpointing", self.gradient_checkpointing)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("sharding", self.sharding, SHARDINGS)
        check_text("sample_prompt", self.sample_prompt)
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size={self.batch_size} cannot be split into accumulation={self.accumulation} equal parts: "
                "choose a multiple",
                field="batch_size",
                other_fields=("accumulation",),
            )

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
