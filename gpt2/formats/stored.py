"""How files round weights, and how far a stored weight can be from the one that it was made from. It reads no file.

A weight is stored as the nearest of the numbers that the file can have, so the error is at most half a step between them.
Steps follow from the weights: in floating point from the weight itself, in integers from the largest weight of those that
share a scale. Such groups lie along the inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


class Stored(NamedTuple):
    """A weight of a file in float32, with its published name and shape, and the kind of its numbers: float16, q4_0, ..."""

    name: str
    values: Tensor
    kind: str


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
    if stored.values.shape != expected.shape:
        raise InputError(f"{stored.name} has shape {tuple(stored.values.shape)} instead of {tuple(expected.shape)}")
    difference = (stored.values.float() - expected).abs()
    is_same = (stored.values == expected) | (stored.values.isnan() & expected.isnan())
    difference = torch.where(is_same, 0.0, difference)
    base = _base(stored.name, expected, stored.kind).clamp(min=torch.finfo(torch.float32).tiny)
    return Error(float(difference.max()), float((difference / base).max()), limit_of(stored.kind))


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
    # Below 8 bits, programs search the scale with the least mean error, which may cut off the largest weights by a step, and
    # round scale and zero point to 6 bits: at most 15/126 of a step each.
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
