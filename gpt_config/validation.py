"""The two checks that every config shares: whole numbers and real numbers, with a message that names the field."""

from __future__ import annotations

import math
from collections.abc import Callable

from gpt_config.errors import ConfigError


def check_whole(name: str, value: object, minimum: int, hint: str = "") -> None:
    """Raise ConfigError unless `value` is an int (not a bool) of `minimum` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r} must be a whole number of {minimum} or more{hint}")


def check_real(name: str, value: object, is_allowed: Callable[[float], bool], allowed: str) -> None:
    """Raise ConfigError unless `value` is a finite number that `is_allowed`; `allowed` says the range in words."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and is_allowed(value)):
        raise ConfigError(f"{name}={value!r} must be {allowed}")
