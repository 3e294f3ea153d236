"""How files round weights, and how far a stored weight can be from the one that it was made from. It reads no file.

A weight is stored as the nearest of the numbers that the file can have, so the error is at most half a step between them.
In floating point the weight itself sets the step. In integers the largest weight of those that share a scale sets it, or the
scale in the file, if that is known. Such groups lie along the inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.formats.gguf_file import group_sizes
from gpt2.formats.layout import is_transposed
from gpt_config.errors import InputError

# Kinds that change no weight, and kinds in floating point: the largest step of a number relative to it, and the least number
# that has such a step, which is the step of all smaller ones.
EXACT = ("float32", "float64")
_FLOATS = {"float16": (2**-10, 2**-14), "bfloat16": (2**-7, 2**-126)}

# Integers with one scale for all inputs of an output, as CTranslate2 and this package have them, and with one scale for a
# matrix, as onnxruntime has them.
INT8_ROWS, UINT8_MATRIX = "int8", "uint8"

_Q8_GROUP = 32

# Scales and products of float32 are rounded, too.
_SLACK = 1e-6

# The largest relative error of a float16, and half of its least step: scales are stored in float16, and a file may have been
# made from weights in float16.
_HALF, _HALF_LEAST = 2**-11, 2**-25

# Weights up to this size may be stored as 0: a float16 scale is 0 below 2^-25, and q6_k multiplies it by up to 128 * 32.
_LOST = 2**-13

# Kinds whose scale is chosen after the integers. With an importance matrix, a weight may then be further than half a step
# from what is stored. Chosen: 1.83 steps is the most that was measured, with weights of a Cauchy distribution.
_SCALE_LAST, _WEIGHTED_STEPS = ("q4_0", "q4_1", "q5_0", "q5_1"), 2.0

# How far a weight may be outside of the range of its group, divided by the largest weight of the group. Without a search:
# one step if the numbers are not symmetric (-8 to 7), and what rounding to float16 does to scale, offset and weights.
_RANGES = {"q8_0": 2**-9, "q4_0": 2**-3 + 2**-9, "q4_1": 2**-9, "q5_0": 2**-4 + 2**-9, "q5_1": 2**-9}

# The same with an importance matrix. Chosen: 0.87 is the most that was measured for 2 bits, and 0.385 for more. A lost scale
# gives 1.
_WEIGHTED_RANGES = {"q2_k": 0.95}
_WEIGHTED_RANGE = 0.5


class Grid(NamedTuple):
    """The numbers that a file can have for each weight: `n_steps` equal steps from `low` to `high`.

    `is_weighted`: an importance matrix has told the program which weights matter.
    """

    low: Tensor
    high: Tensor
    n_steps: int
    is_weighted: bool = False


class Stored(NamedTuple):
    """A weight of a file in float32, with its published name and shape, and the kind of its numbers: float16, q4_0, ...

    `grid` computes the numbers that the file can have for it, if they are known.
    """

    name: str
    values: Tensor
    kind: str
    grid: Callable[[], Grid] | None = None


class Error(NamedTuple):
    """The largest error of stored weights, also divided by the weights that set the steps, and the limit of the latter."""

    absolute: float
    relative: float
    limit: float

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains the error. False for NaN."""
        return self.relative <= self.limit


def error_of(stored: Stored, expected: Tensor) -> Error:
    """Return the error of a stored weight. Numbers that are NaN or infinite in both are equal."""
    expected = expected.detach().float()
    if stored.grid is not None:
        return _error_on_grid(stored, expected, stored.grid())
    if stored.values.shape != expected.shape:
        raise InputError(f"{stored.name} has shape {tuple(stored.values.shape)} instead of {tuple(expected.shape)}")
    difference = _difference(stored.values.float(), expected)
    base = _base(stored.name, expected, stored.kind).clamp(min=torch.finfo(torch.float32).tiny)
    of_scale = 127 * _HALF_LEAST if stored.kind == "q8_0" else 0.0  # a scale below the normal numbers of float16
    relative = (difference - of_scale).clamp(min=0) / base
    return Error(float(difference.max()), float(relative.max()), limit_of(stored.kind))


def _difference(a: Tensor, b: Tensor) -> Tensor:
    is_same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(is_same, 0.0, (a - b).abs())


def _error_on_grid(stored: Stored, expected: Tensor, grid: Grid) -> Error:
    """The error of weights in the range of their group, in steps."""
    ratio = _steps(stored, expected, grid)
    return Error(float(_difference(stored.values, expected).max()), float(ratio.max()), _steps_allowed(stored.kind, grid))


def _steps(stored: Stored, expected: Tensor, grid: Grid) -> Tensor:
    """How many steps a stored number is from its weight, or from the end of the range if the weight is outside of it.

    A step includes twice what rounding to float16 can change, so that half a step is always the limit.
    """
    nearest_end = torch.minimum(torch.maximum(expected, grid.low), grid.high)
    step = (grid.high - grid.low) / grid.n_steps + 2 * (_of_rounded_scales(stored.kind, grid) + _HALF * expected.abs())
    return _difference(stored.values, nearest_end) / step.clamp(min=torch.finfo(step.dtype).tiny)  # a scale may be 0


def _of_rounded_scales(kind: str, grid: Grid) -> Tensor:
    """How far numbers move when scale and offset are rounded after the integers are chosen. K kinds choose these last."""
    largest = torch.maximum(grid.low.abs(), grid.high.abs())
    if kind in ("q4_1", "q5_1"):
        return _HALF * (grid.low.abs() + grid.high - grid.low) + (grid.n_steps + 1) * _HALF_LEAST
    if kind in ("q8_0", "q4_0", "q5_0"):
        return _HALF * largest + (grid.n_steps + 1) / 2 * _HALF_LEAST
    return _SLACK * largest


def _steps_allowed(kind: str, grid: Grid) -> float:
    return _WEIGHTED_STEPS if grid.is_weighted and kind in _SCALE_LAST else 0.5


def range_error_of(stored: Stored, expected: Tensor) -> Error | None:
    """Return how far weights are outside of the range of their group, or None if the range is not known.

    Programs may cut off the largest weights of a group if that makes the others better.
    """
    if stored.grid is None:
        return None
    expected, grid = expected.detach().float(), stored.grid()
    outside = torch.maximum(expected - grid.high, grid.low - expected).clamp(min=0)
    base = _base(stored.name, expected, stored.kind).clamp(min=_LOST)
    limit = _RANGES.get(stored.kind, limit_of(stored.kind))
    if grid.is_weighted:
        limit = _WEIGHTED_RANGES.get(stored.kind, _WEIGHTED_RANGE)
    return Error(float(outside.max()), float(((outside - _LOST).clamp(min=0) / base).max()), limit)


def rounded_as(stored: Stored, expected: Tensor) -> Tensor:
    """Return a weight with the numbers of the file, where these are a rounding of it.

    Where they are not, it has the nearest number of its group, or its own if these are not known.
    """
    if stored.grid is None:
        return stored.values if error_of(stored, expected).is_rounding else expected
    grid = stored.grid()
    step = (grid.high - grid.low) / grid.n_steps
    number = ((expected - grid.low) / step).round().clamp(0, grid.n_steps)
    near = torch.where(step > 0, grid.low + number * step, grid.low)
    return torch.where(_steps(stored, expected, grid) <= _steps_allowed(stored.kind, grid), stored.values, near)


def wrong_weight(stored: Iterable[Stored], expected: Mapping[str, Tensor]) -> str | None:
    """Return the name of a weight that rounding does not explain, or that is not stored, or None."""
    missing = set(expected)
    for each in stored:
        if each.values.shape != expected[each.name].shape or not error_of(each, expected[each.name]).is_rounding:
            return each.name
        missing.discard(each.name)
    return min(missing, default=None)


def limit_of(kind: str) -> float:
    """Return the largest error of a weight of this kind, divided by the weight that sets the step.

    >>> limit_of("bfloat16"), round(limit_of("int8"), 5), round(limit_of("q4_0"), 3)
    (0.00390625, 0.00394, 0.167)
    """
    if kind in EXACT:
        return 0.0
    if kind in _FLOATS:
        return _FLOATS[kind][0] / 2
    if kind == INT8_ROWS:
        return 0.5 / 127 + _SLACK
    if kind == UINT8_MATRIX:
        return 1 / 255 + _SLACK  # the zero point is rounded, too, so that the end of the range may be one step off
    if kind == "q8_0":
        return 0.5 / 127 + 2**-11 + _SLACK  # the scale is a float16
    # Below 8 bits, programs search the scale with the least mean error, which may cut off the largest weights, and round
    # scale and zero point to 6 bits. The factor is chosen: 77% of this limit is the most that was measured.
    group, n_bytes = group_sizes(kind)
    n_bits = 8 * n_bytes // group  # the rest are scales
    return float(1.25 / (2 ** (n_bits - 1) - 0.5))


def _base(name: str, expected: Tensor, kind: str) -> Tensor:
    """The weights that set the steps of `expected`, in its shape or one that broadcasts to it."""
    if kind in EXACT:
        return expected.new_ones(())
    if kind in _FLOATS:
        return expected.abs().clamp(min=_FLOATS[kind][1])
    if kind == UINT8_MATRIX:
        low, high = expected.aminmax()
        return high.clamp(min=0) - low.clamp(max=0)
    rows = _rows(name, expected)
    size = rows.shape[-1] if kind == INT8_ROWS else group_sizes(kind)[0]
    groups = rows.unflatten(-1, (-1, size)).abs()  # (outputs, groups, weights)
    return _published(name, groups.amax(-1, keepdim=True).expand_as(groups).flatten(-2))


def nearest(name: str, weight: Tensor, kind: str) -> Tensor | None:
    """Return a float32 weight rounded to the nearest numbers of a kind, or None if programs choose other ones, too."""
    if kind in EXACT:
        return weight
    if kind in _FLOATS:
        return weight.to(getattr(torch, kind)).float()
    if kind != "q8_0":
        return None
    groups = _rows(name, weight).unflatten(-1, (-1, _Q8_GROUP))
    step = groups.abs().amax(-1, keepdim=True) / 127
    numbers = groups * torch.where(step > 0, 1 / step, torch.zeros_like(step))
    rounded = (numbers.abs() + 0.5).floor().copysign(numbers) * step.half().float()  # halves away from 0
    return _published(name, rounded.flatten(-2))


def _rows(name: str, weight: Tensor) -> Tensor:
    """A matrix as (outputs, inputs)."""
    return weight.t() if is_transposed(name, weight) else weight


_published = _rows  # the way back is the same
