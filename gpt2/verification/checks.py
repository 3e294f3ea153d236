"""What a check is: two independent computations of the same numbers, a tolerance and its reason, and what came of it.

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

# (what it is, what the subject computed, what the oracle computed); numbers, lists of them, arrays or tensors
Pair = tuple[str, Any, Any]


class Status(enum.StrEnum):
    """What came of a check. A warning is what works here and may break elsewhere."""

    PASS = "pass"
    FAIL = "fail"
    WARNING = "warning"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Tolerance:
    """The largest relative difference that is no mistake, and why."""

    value: float
    reason: str


# Some gradients are zero in theory (a lone token has nothing to compare its query with), and rounding in practice.
SMALL = 0.01

# How far from a point its neighbours are, of which the slope is computed: nearer, rounding would tell; farther, curvature.
DIFFERENCE_STEP = 1e-5

EXACT = Tolerance(0.0, "whole numbers: they are equal or they are not")
FLOAT64 = Tolerance(1e-10, "float64 rounds at 1e-16, and each engine adds up in another order")
FLOAT32 = Tolerance(1e-4, "float32 rounds at 6e-8, and each engine adds up in another order")
STEPS = Tolerance(1e-9, "what float64 rounds off in one training step, the next ones build on")
DIFFERENCES = Tolerance(1e-6, "(L(x + h) - L(x - h)) / 2h with h = 1e-5 is the derivative up to about 1e-9")
BY_DTYPE = {"float64": FLOAT64, "float32": FLOAT32}


@dataclass(frozen=True)
class Outcome:
    """What came of a check; the differences are None where nothing was compared, `note` says what the user should know."""

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
    """`part` of the engine `subject` against `oracle`: `pairs` computes what both say, when it is run."""

    part: str
    subject: str
    oracle: str
    dtype: str
    tolerance: Tolerance
    pairs: Callable[[], Iterable[Pair]]

    def run(self) -> Outcome:
        """Compare all pairs. An engine that raises an error has failed."""
        absolute = relative = 0.0
        status, notes = Status.PASS, []
        try:
            for name, found, expected in self.pairs():
                pair_absolute, pair_relative = _difference(found, expected)
                if not pair_relative <= self.tolerance.value:  # NaN is not
                    status = Status.FAIL
                    notes.append(name)
                absolute, relative = _larger(absolute, pair_absolute), _larger(relative, pair_relative)
        except (GPT2Error, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            status, absolute, relative = Status.FAIL, math.nan, math.nan
            notes = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
        note = ", ".join(notes[:3]) + (f" and {len(notes) - 3} more" if len(notes) > 3 else "")
        return Outcome(self.part, self.subject, self.oracle, self.dtype, status, absolute, relative, self.tolerance, note)


def _difference(found: Any, expected: Any) -> tuple[float, float]:
    """The largest |found - expected|, and that as a share of the largest |expected|, or of `SMALL` where all are smaller."""
    actual, oracle = (np.asarray(value, dtype=np.float64) for value in (found, expected))
    if actual.shape != oracle.shape:
        raise ValueError(f"shape {actual.shape} instead of {oracle.shape}")
    if not actual.size:
        raise ValueError("nothing was computed")
    absolute = float(np.abs(actual - oracle).max())
    return absolute, absolute / max(float(np.abs(oracle).max()), SMALL)


def _larger(a: float, b: float) -> float:
    return b if math.isnan(b) or b > a else a
