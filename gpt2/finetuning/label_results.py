"""Results of a classifier with several labels per text, and of a regression. It knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# A label of a text is predicted if its probability is at least this.
THRESHOLD = 0.5


def f1(n_right: int, n_predicted: int, n_actual: int) -> float:
    """Return the harmonic mean of precision and recall; 0 if nothing was predicted and nothing is there."""
    return 2 * n_right / (n_actual + n_predicted) if n_actual + n_predicted else 0.0


def macro_f1(by_label: Sequence[float], occurs: Sequence[bool]) -> float:
    """Return the mean F1 of the labels that occur in the texts or were predicted, as scikit-learn does; 0 if none does."""
    values = [value for value, is_there in zip(by_label, occurs, strict=True) if is_there]
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True)
class MultiLabelResult:
    """Counts of texts for each label: with the label (`actual`), with it predicted (`predicted`), and with both (`right`).

    `n_exact` is the number of texts for which exactly the right labels were predicted, of `n_texts`.
    """

    labels: tuple[str, ...]
    actual: list[int]
    predicted: list[int]
    right: list[int]
    n_exact: int
    n_texts: int

    @classmethod
    def of(
        cls, labels: Sequence[str], actual: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]
    ) -> MultiLabelResult:
        """Count from `actual` (texts, labels) of 0 and 1, and the probabilities `scores` (texts, labels)."""
        there, found = np.asarray(actual) > 0, np.asarray(scores) >= THRESHOLD
        actual_of, predicted, right = (matrix.sum(0).tolist() for matrix in (there, found, there & found))
        n_exact = int((there == found).all(1).sum())
        return cls(tuple(labels), actual_of, predicted, right, n_exact, len(there))

    @property
    def accuracy(self) -> float:
        """The share of texts for which exactly the right labels were predicted, from 0 to 1."""
        return self.n_exact / self.n_texts

    def to_dict(self) -> dict[str, Any]:
        """Return metrics and counts as a dict that JSON can represent."""
        by_label = [f1(*counts) for counts in zip(self.right, self.predicted, self.actual, strict=True)]
        return {
            "accuracy": self.accuracy,
            "micro_f1": f1(sum(self.right), sum(self.predicted), sum(self.actual)),
            "macro_f1": macro_f1(by_label, [a + p > 0 for a, p in zip(self.actual, self.predicted, strict=True)]),
            "f1": dict(zip(self.labels, by_label, strict=True)),
            "labels": list(self.labels),
            "actual": self.actual,
            "predicted": self.predicted,
            "right": self.right,
        }


@dataclass(frozen=True)
class RegressionResult:
    """The values of the texts, and those that the model predicted, as many."""

    actual: list[float]
    predicted: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Return the mean squared and absolute errors, and r2: 1 minus the share of the variance that is left.

        `r2` is None if all values are equal.
        """
        actual, errors = np.array(self.actual), np.array(self.predicted) - np.array(self.actual)
        spread, mse = float(np.square(actual - actual.mean()).mean()), float(np.square(errors).mean())
        return {
            "mse": mse,
            "rmse": math.sqrt(mse),
            "mae": float(np.abs(errors).mean()),
            "r2": 1 - mse / spread if spread else None,
        }
