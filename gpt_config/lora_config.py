"""LoRAConfig: which layers have a low-rank adapter, and its rank and scale. It knows nothing of files or weights."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpt_config.errors import ConfigError
from gpt_config.validation import check_bool, check_real, check_whole, plain_number, plain_numbers

# No layer of a GPT-2 is this wide, and an update of a higher rank would not be low-rank.
_MAX_RANK = 1 << 16

# Far above any use. A value such as 1e300 makes the weights infinite.
_MAX_ALPHA = 1_000_000
_ALLOWED_ALPHA = f"a positive number up to {_MAX_ALPHA:,}, such as twice the rank"
# Characters of a regular expression, which is compiled before it is used.
_MAX_PATTERN = 10_000
# Names, numbers or patterns of layers in one field. No GPT-2 has as many layers.
_MAX_ENTRIES = 1000
# The modules of GPT-2 that an adapter may replace as a whole.
SAVED_WHOLE = ("wte", "wpe", "ln_f", "ln_1", "ln_2")


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
    layers_to_transform: tuple[int, ...] = ()  # the numbers of the blocks with adapters, from 0; empty: all blocks
    # Other ranks and alphas of some layers: (pattern, value). A pattern is the end of a module's name or a regular
    # expression for it, as in peft; the first one that matches counts. A mapping is accepted too.
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    # Embeddings and norms that are trained as a whole, by the ends of their names: wte, wpe, ln_f, ln_1, ln_2.
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_whole("rank", self.rank, 1)
        if self.rank > _MAX_RANK:
            raise ConfigError(f"rank={self.rank} must be at most {_MAX_RANK}: no layer of GPT-2 is wider", field="rank")
        check_real("alpha", self.alpha, lambda alpha: 0 < alpha <= _MAX_ALPHA, _ALLOWED_ALPHA)
        check_real("dropout", self.dropout, lambda p: 0 <= p < 1, "a probability of 0 or more and less than 1")
        check_bool("use_rslora", self.use_rslora)
        self._check_targets()
        self._check_layers()
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, _checked_pattern(name, getattr(self, name)))

    def _check_layers(self) -> None:
        for name in ("layers_to_transform", "modules_to_save"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise ConfigError(f"{name}={value!r:.80} must be a tuple", field=name)
            _check_number(name, value)
            object.__setattr__(self, name, tuple(value))
        for number in self.layers_to_transform:
            check_whole("layers_to_transform", number, 0)
        if self.layers_to_transform and isinstance(self.target_modules, str):
            raise ConfigError(
                f"layers_to_transform={self.layers_to_transform} needs a list of target_modules, not a regular expression: "
                "put the numbers of the layers into the expression",
                field="layers_to_transform",
                other_fields=("target_modules",),
            )
        for module in self.modules_to_save:
            if not isinstance(module, str) or module.rpartition(".")[2] not in SAVED_WHOLE:
                raise ConfigError(
                    f"modules_to_save={list(self.modules_to_save)!r} is not supported: use names of embeddings and norms, "
                    f"{', '.join(SAVED_WHOLE)}",
                    field="modules_to_save",
                )

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
        _check_number("target_modules", names)
        if isinstance(targets, str):
            if len(targets) > _MAX_PATTERN:
                raise ConfigError(
                    f"target_modules has {len(targets)} characters: a regular expression may have {_MAX_PATTERN}",
                    field="target_modules",
                )
            try:
                _check_expression(targets)
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

    def is_in_layers(self, module: str) -> bool:
        """Whether `module`, such as "transformer.h.0.attn.c_attn", is in one of `layers_to_transform`, if there are any."""
        block = re.match(r"(?:transformer\.)?h\.(\d+)\.", module)
        return not self.layers_to_transform or (block is not None and int(block[1]) in self.layers_to_transform)

    def saves(self, module: str) -> bool:
        """Whether the module with the name `module`, such as "transformer.wte", is trained as a whole."""
        return any(module.endswith(name) for name in self.modules_to_save)


def _check_number(name: str, entries: Sequence[object]) -> None:
    if len(entries) > _MAX_ENTRIES:
        raise ConfigError(f"{name} has {len(entries)} entries: it may have {_MAX_ENTRIES}", field=name)


def _check_expression(pattern: str) -> None:
    """Compile `pattern`, whose errors are re.error, RecursionError and OverflowError."""
    with warnings.catch_warnings(action="ignore"):  # about characters that a later Python may read in another way
        re.compile(pattern)


def _checked_pattern(name: str, pattern: Any) -> tuple[tuple[str, Any], ...]:
    """`pattern`, a mapping or a tuple of pairs, as a tuple of pairs. ConfigError if a key or value is invalid."""
    try:
        pairs = tuple((key, plain_number(value)) for key, value in dict(pattern).items())
        if len(pairs) > _MAX_ENTRIES:
            raise ValueError(f"there are {len(pairs)}, more than {_MAX_ENTRIES}")
        for key, value in pairs:
            if not isinstance(key, str) or len(key) > _MAX_PATTERN:
                raise TypeError(f"{key!r:.80} is not a name, or has more than {_MAX_PATTERN} characters")
            _check_expression(rf"(.*\.)?({key})$")  # what it becomes in peft
            if name == "rank_pattern":
                check_whole(f"{name}: {key:.80}", value, 1)
                check_real(f"{name}: {key:.80}", value, lambda rank: rank <= _MAX_RANK, f"at most {_MAX_RANK}")
            else:
                check_real(f"{name}: {key:.80}", value, lambda alpha: 0 < alpha <= _MAX_ALPHA, _ALLOWED_ALPHA)
    except (re.error, RecursionError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{name}={pattern!r:.80} must map patterns of layer names to numbers ({error})", field=name
        ) from None
    return pairs
