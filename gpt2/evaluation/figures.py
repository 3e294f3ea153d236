"""Metrics over a sample of items, with standard errors and confidence intervals. It knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpt_config.errors import CheckpointError

_Z = 1.959963984540054  # 95% of a normal distribution lie within this many standard deviations of the mean


@dataclass(frozen=True)
class Figure:
    """A value, its standard error (None for a single item), and its 95% confidence interval (None if it is unknown)."""

    name: str
    value: float
    standard_error: float | None
    low: float | None
    high: float | None


def accuracy(name: str, is_right: Sequence[bool]) -> Figure:
    """The share of True in `is_right`, between 0 and 1. `is_right` must not be empty.

    The interval is Wilson's (1927), because it is also valid for few items and near 0 and 1.
    """
    n, p = len(is_right), sum(is_right) / len(is_right)
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    reach = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    error = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
    return Figure(name, p, error, max(0.0, centre - reach), min(1.0, centre + reach))


def perplexity(name: str, log_probs: Sequence[float]) -> Figure:
    """exp of the mean of -log p over items. `log_probs` are natural logarithms, at least one.

    To first order, the standard error of the perplexity is the perplexity times the standard error of the mean. The ends of
    the interval are exp of the ends of the mean's interval.
    """
    n, mean = len(log_probs), -math.fsum(log_probs) / len(log_probs)
    value = bounded_exp(mean)
    if n == 1:
        return Figure(name, value, None, None, None)
    error = math.sqrt(math.fsum((x + mean) ** 2 for x in log_probs) / (n - 1) / n)
    return Figure(name, value, value * error, bounded_exp(mean - _Z * error), bounded_exp(mean + _Z * error))


def check_not_nan(value: float) -> None:
    """Raise CheckpointError if `value`, a sum over what a model computed, is NaN: no figure of that model has a meaning."""
    if math.isnan(value):
        raise CheckpointError("the model computes NaN: its weights are damaged, or its dtype is too narrow; try float32")


def bounded_exp(value: float) -> float:
    """exp(value); infinity for a value of 700 or more, near the largest float."""
    return math.exp(value) if value < 700 else math.inf
