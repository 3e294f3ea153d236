"""A check compares two independent computations of the same numbers within a tolerance, and returns an outcome.

It knows numbers only, no engines.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt_config.errors import GPT2Error

# (name, result of the subject, result of the oracle). Results are numbers, nested lists, arrays or tensors.
Pair = tuple[str, Any, Any]


class Status(enum.StrEnum):
    """The result of a check. WARNING means that it works here but may fail in other programs."""

    PASS = "pass"
    FAIL = "fail"
    WARNING = "warning"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Tolerance:
    """The largest relative difference that a check accepts, and the reason for it."""

    value: float
    reason: str


# A relative difference is divided by at least this number, because some gradients are 0 in theory and rounding errors in
# practice: a single token has nothing to compare its query with.
SMALL = 0.01

# h in the central difference (L(x + h) - L(x - h)) / 2h. A smaller h increases the error from rounding, a larger h the error
# from curvature.
DIFFERENCE_STEP = 1e-5

EXACT = Tolerance(0.0, "integers must be equal")
FLOAT64 = Tolerance(1e-10, "float64 rounds with errors of 1e-16, and the engines add in different orders")
FLOAT32 = Tolerance(1e-4, "float32 rounds with errors of 6e-8, and the engines add in different orders")
STEPS = Tolerance(1e-9, "each training step in float64 continues with the rounding errors of the steps before")
DIFFERENCES = Tolerance(1e-6, "(L(x + h) - L(x - h)) / 2h with h = 1e-5 is the derivative up to about 1e-9")
BY_DTYPE = {"float64": FLOAT64, "float32": FLOAT32}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check. The differences are None if nothing was compared; `note` names the faults for the user."""

    part: str
    subject: str
    oracle: str
    dtype: str
    status: Status
    absolute: float | None = None
    relative: float | None = None
    tolerance: Tolerance | None = None
    note: str = ""


@dataclass(frozen=True)
class Check:
    """`part` of the engine `subject` against `oracle`. `pairs` computes the results of both when the check runs."""

    part: str
    subject: str
    oracle: str
    dtype: str
    tolerance: Tolerance
    pairs: Callable[[], Iterable[Pair]]

    def run(self) -> Outcome:
        """Compare all pairs. If an engine raises an error, the check fails and the note gives the error."""
        absolute = relative = 0.0
        status, notes = Status.PASS, []
        try:
            for name, found, expected in self.pairs():
                pair_absolute, pair_relative = _difference(found, expected)
                if not pair_relative <= self.tolerance.value:  # also true for NaN
                    status = Status.FAIL
                    notes.append(name)
                absolute, relative = _larger(absolute, pair_absolute), _larger(relative, pair_relative)
        except (GPT2Error, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            status, absolute, relative = Status.FAIL, math.nan, math.nan
            notes = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
        note = ", ".join(notes[:3]) + (f" and {len(notes) - 3} more" if len(notes) > 3 else "")
        return Outcome(self.part, self.subject, self.oracle, self.dtype, status, absolute, relative, self.tolerance, note)


def _difference(found: Any, expected: Any) -> tuple[float, float]:
    """The largest |found - expected|, and that divided by the largest |expected|, or by `SMALL` if that is larger."""
    actual, oracle = (np.asarray(value, dtype=np.float64) for value in (found, expected))
    if actual.shape != oracle.shape:
        raise ValueError(f"shape {actual.shape} instead of {oracle.shape}")
    if not actual.size:
        raise ValueError("nothing was computed")
    absolute = float(np.abs(actual - oracle).max())
    return absolute, absolute / max(float(np.abs(oracle).max()), SMALL)


def _larger(a: float, b: float) -> float:
    return b if math.isnan(b) or b > a else a
