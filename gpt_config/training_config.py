"""TrainingConfig: how a model is trained. It knows nothing of the model's shape, nor of where data and results stand."""

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
    """One training run; every field is validated on construction. Sizes count over all processes together.

    >>> TrainingConfig(max_steps=100, warmup_steps=10, learning_rate=1e-3).tokens_per_step
    16384
    """

    # Batches
    batch_size: int = 64  # rows of `context` tokens in each step
    context: int = 256  # tokens that a row has
    accumulation: int = 1  # each process does its rows in so many parts, which bounds the memory they need
    max_steps: int = 2000

    # AdamW (Loshchilov & Hutter 2017); the learning rate climbs for `warmup_steps`, then falls along a cosine
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1  # of matrices only: biases and layer norms keep their size
    beta1: float = 0.9
    beta2: float = 0.99
    clip_norm: float = 1.0  # longer gradients are shortened to this; 0 leaves them

    # How it is computed
    precision: str = "auto"  # of the matrix products: bfloat16 where the machine gains from it
    compile: bool = False  # torch.compile: half a minute at the start, faster steps afterwards
    gradient_checkpointing: bool = False  # compute each layer twice instead of keeping it: less memory, slower
    sharding: str = "ddp"  # several processes: each has the whole model (ddp) or its share of it (fsdp)
    seed: int = 0

    # What is reported and kept, in steps
    eval_interval: int = 250
    patience: int = 0  # evaluations in a row without a better loss, after which the run ends; 0: it goes to the end
    eval_batches: int = 20  # batches that each evaluation looks at, spread over the validation text
    checkpoint_interval: int = 250
    log_interval: int = 10
    sample_prompt: str = ""  # what the sample at each evaluation begins with; empty is a new document
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
            check_real(name, getattr(self, name), lambda value: 0 <= value < 1, "between 0 and 1, and below 1")
        check_bool("compile", self.compile)
        check_bool("gradient_checkpointing", self.gradient_checkpointing)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("sharding", self.sharding, SHARDINGS)
        check_text("sample_prompt", self.sample_prompt)
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size={self.batch_size} cannot be done in accumulation={self.accumulation} equal parts: "
                "choose a multiple",
                field="batch_size",
                other_fields=("accumulation",),
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all processes together learn from in one step."""
        return self.batch_size * self.context

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainingConfig:
        """The config of these fields; ConfigError names one that there is not."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ConfigError(
                f"{unknown[0]} is not a field of TrainingConfig: it has {', '.join(sorted(known))}", field=unknown[0]
            )
        return cls(**fields)
