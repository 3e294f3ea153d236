"""The checks that configs share, with messages that begin with the field's name and value; and plain numbers for NumPy's.

It knows no config, and does not import NumPy: what it accepts are Python's own protocols for numbers.
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
    """`value` as Python's own bool, int or float if it is a number of NumPy's or another library's, else as it is.

    A scalar with `item()`, such as np.bool_ or a 0-dimensional array, is what `item()` gives.
    """
    if type(value) in (bool, int, float, str, type(None)):
        return value
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    if isinstance(value, numbers.Real):  # also what item() leaves as it is, such as np.longdouble
        try:
            return float(value)
        except OverflowError:  # a fraction beyond all floats: the check of its field refuses it
            return value
    return value


def plain_numbers(config: Any) -> None:
    """Replace each number in the fields of a dataclass, and in their tuples, by `plain_number` of it; also if it is frozen.

    To be called first in `__post_init__`, so that the checks see plain numbers and JSON can hold them.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain = tuple(map(plain_number, value)) if type(value) is tuple else plain_number(value)
        if plain is not value:
            object.__setattr__(config, field.name, plain)


def check_whole(name: str, value: object, minimum: int, hint: str = "", maximum: int | None = None) -> None:
    """Raise ConfigError unless `value` is an int (not a bool) of `minimum` or more, and at most `maximum`."""
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r} must be a whole number of {minimum} or more{hint}", field=name)
    if maximum is not None and value > maximum:
        raise ConfigError(f"{name}={value!r} must be at most {maximum}: no GPT-2 has more", field=name)


def check_real(name: str, value: object, is_allowed: Callable[[float], bool], allowed: str) -> None:
    """Raise ConfigError unless `value` is a finite number that `is_allowed`; `allowed` says the range in words."""
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        is_good = False
    else:
        is_good = abs(value) <= sys.float_info.max and is_allowed(value)  # infinity is more, and NaN is not less
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
        raise ConfigError(f"{name}={value!r} must be a text", field=name)


def check_seed(seed: object) -> None:
    """Raise ConfigError unless `seed` is an int of 0 or more that fits 63 bits."""
    check_whole("seed", seed, 0)
    if plain_number(seed) >= 1 << 63:
        raise ConfigError(f"seed={seed} must be below 2**63", field="seed")
