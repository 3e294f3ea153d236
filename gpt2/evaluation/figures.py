"""Figures with their uncertainty: the mean of what was measured on a sample of items, and how far off it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054  # standard deviations to either side that hold 95% of a normal distribution


@dataclass(frozen=True)
class Figure:
    """A value with its standard error (None for a single item) and its 95% confidence interval."""

    name: str
    value: float
    standard_error: float | None
    low: float | None
    high: float | None


def accuracy(name: str, is_right: Sequence[bool]) -> Figure:
    """The share that is right, with Wilson's interval (1927), which holds for few items and near 0 and 1 too."""
    n, p = len(is_right), sum(is_right) / len(is_right)
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    reach = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    error = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
    return Figure(name, p, error, max(0.0, centre - reach), min(1.0, centre + reach))


def perplexity(name: str, log_probs: Sequence[float]) -> Figure:
    """exp of the mean of -log p over items; its standard error is, to first order, that of the mean times its value."""
    n, mean = len(log_probs), -math.fsum(log_probs) / len(log_probs)
    value = bounded_exp(mean)
    if n == 1:
        return Figure(name, value, None, None, None)
    error = math.sqrt(math.fsum((x + mean) ** 2 for x in log_probs) / (n - 1) / n)
    return Figure(name, value, value * error, bounded_exp(mean - _Z * error), bounded_exp(mean + _Z * error))


def bounded_exp(value: float) -> float:
    """exp, and infinity where a float ends."""
    return math.exp(value) if value < 700 else math.inf
