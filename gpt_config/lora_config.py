"""LoRAConfig: which layers have a low-rank adapter, and its rank and scale. It knows nothing of files or weights."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gpt_config.errors import ConfigError
from gpt_config.validation import check_bool, check_real, check_whole, plain_numbers

# No layer of a GPT-2 is this wide, and an update of a higher rank would not be low-rank.
_MAX_RANK = 1 << 16

# Far above any use. A value such as 1e300 makes the weights infinite.
_MAX_ALPHA = 1_000_000
# Characters of a regular expression, which is compiled before it is used.
_MAX_PATTERN = 10_000


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """LoRA (Hu et al. 2021): W + scale * (B A)^T in place of W, with trained matrices A (rank, n_in) and B (n_out, rank).

    Every field is validated on construction.

    >>> LoRAConfig(rank=8, alpha=16.0).scale
    2.0
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # on the adapter's input, in training
    # Last parts of module names, or one regular expression for whole names, as in peft. "c_proj" is in attention and MLP,
    # "mlp.c_proj" only in the MLP; whole names begin with "transformer.h.0".
    target_modules: tuple[str, ...] | str = ("c_attn", "c_proj", "c_fc")
    use_rslora: bool = False  # divide alpha by sqrt(rank), so that high ranks learn as fast as low ones (Kalajdzievski 2023)

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_whole("rank", self.rank, 1)
        if self.rank > _MAX_RANK:
            raise ConfigError(f"rank={self.rank} must be at most {_MAX_RANK}: no layer of GPT-2 is wider", field="rank")
        allowed = f"a positive number up to {_MAX_ALPHA:,}, such as twice the rank"
        check_real("alpha", self.alpha, lambda alpha: 0 < alpha <= _MAX_ALPHA, allowed)
        check_real("dropout", self.dropout, lambda p: 0 <= p < 1, "a probability of 0 or more and less than 1")
        check_bool("use_rslora", self.use_rslora)
        self._check_targets()

    def _check_targets(self) -> None:
        targets = self.target_modules
        if isinstance(targets, list):
            targets = tuple(targets)
            object.__setattr__(self, "target_modules", targets)
        names = (targets,) if isinstance(targets, str) else targets
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(
                f"target_modules={targets!r} must be names of layers, such as ('c_attn', 'c_proj', 'c_fc'), "
                "or a regular expression",
                field="target_modules",
            )
        if isinstance(targets, str):
            if len(targets) > _MAX_PATTERN:
                raise ConfigError(
                    f"target_modules has {len(targets)} characters: a regular expression may have {_MAX_PATTERN}",
                    field="target_modules",
                )
            try:
                re.compile(targets)
            except (re.error, RecursionError, OverflowError) as error:
                raise ConfigError(
                    f"target_modules={targets!r} is not a regular expression ({error})", field="target_modules"
                ) from None

    @property
    def scale(self) -> float:
        """The factor of the product of the adapter's matrices."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def targets(self) -> tuple[str, ...]:
        """`target_modules` as a tuple: its names, or its one regular expression."""
        return (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
