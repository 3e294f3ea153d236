"""The checks that configs share: whole numbers, real numbers and switches, with messages that name the field."""

from __future__ import annotations

import sys
from collections.abc import Callable

from gpt_config.errors import ConfigError


def check_whole(name: str, value: object, minimum: int, hint: str = "", maximum: int | None = None) -> None:
    """Raise ConfigError unless `value` is an int (not a bool) of `minimum` or more, and at most `maximum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r} must be a whole number of {minimum} or more{hint}")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{name}={value!r} must be at most {maximum}: no GPT-2 has more")


def check_real(name: str, value: object, is_allowed: Callable[[float], bool], allowed: str) -> None:
    """Raise ConfigError unless `value` is a finite number that `is_allowed`; `allowed` says the range in words."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        is_good = False
    else:
        is_good = abs(value) <= sys.float_info.max and is_allowed(value)  # infinity is more, and NaN is not less
    if not is_good:
        raise ConfigError(f"{name}={value!r} must be {allowed}")


def check_bool(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be true or false")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(choices)}")


def check_seed(seed: object) -> None:
    """Raise ConfigError unless `seed` is an int of 0 or more that fits 63 bits."""
    check_whole("seed", seed, 0)
    if isinstance(seed, int) and seed >= 1 << 63:
        raise ConfigError(f"seed={seed} must be below 2**63")
