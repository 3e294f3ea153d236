"""Checks of config fields, and conversion of NumPy's numbers to Python's. Standard library only.

Messages begin with the name and value of the field. NumPy is not imported: its numbers follow Python's number protocols.
"""

from __future__ import annotations

import dataclasses
import numbers
import operator
import sys
from collections.abc import Callable
from typing import Any

from gpt_config.errors import ConfigError


def plain_number(value: Any) -> Any:
    """`value` as Python's bool, int or float if it is a number of NumPy or another library; otherwise `value` itself.

    Scalars with an `item()` method, such as np.bool_ and 0-dimensional arrays, are converted by it.
    """
    if type(value) in (bool, int, float, str, type(None)):
        return value
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    if isinstance(value, numbers.Real):  # also types that item() does not convert, such as np.longdouble
        try:
            return float(value)
        except OverflowError:  # a fraction larger than any float: the check of its field rejects it
            return value
    return value


def plain_numbers(config: Any) -> None:
    """Apply `plain_number` to each field of a dataclass, also of a frozen one, and to each element of its tuples.

    Call it first in `__post_init__`: the checks and JSON need plain numbers.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain = tuple(map(plain_number, value)) if type(value) is tuple else plain_number(value)
        if plain is not value:
            object.__setattr__(config, field.name, plain)


def check_whole(
    name: str,
    value: object,
    minimum: int,
    hint: str = "",
    maximum: int | None = None,
    limit: str = "no GPT-2 is larger",
) -> None:
    """Raise ConfigError unless `value` is an int (not a bool) from `minimum` to `maximum` (None: no maximum).

    `hint` is appended to the message for a value that is no int or too small; `limit` is the reason for the maximum.
    """
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r} must be a whole number of {minimum} or more{hint}", field=name)
    if maximum is not None and value > maximum:
        raise ConfigError(f"{name}={value!r} must be at most {maximum}: {limit}", field=name)


def check_real(name: str, value: object, is_allowed: Callable[[float], bool], allowed: str) -> None:
    """Raise ConfigError unless `value` is a finite number for which `is_allowed`; `allowed` describes the range."""
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        is_good = False
    else:
        is_good = abs(value) <= sys.float_info.max and is_allowed(value)  # the comparison is false for infinity and NaN
    if not is_good:
        raise ConfigError(f"{name}={value!r} must be {allowed}", field=name)


def check_bool(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is True or False."""
    value = plain_number(value)
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be true or false", field=name)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(choices)}", field=name)


def check_text(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a str."""
    if not isinstance(value, str):
        raise ConfigError(f"{name}={value!r} must be a string", field=name)


def check_seed(seed: object) -> None:
    """Raise ConfigError unless `seed` is an int from 0 to 2**63 - 1."""
    check_whole("seed", seed, 0)
    if plain_number(seed) >= 1 << 63:
        raise ConfigError(f"seed={seed} must be below 2**63", field="seed")
