"""A component: one function of GPT-2, how each engine computes it, and the checks that compare the engines.

It knows which shapes are tested and how engines are compared. The functions themselves are listed in `components`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2.verification.checks import BY_DTYPE, DIFFERENCE_STEP, DIFFERENCES, FLOAT64, Check, Pair
from gpt_config.model_config import GPT2Config

Array = np.ndarray[Any, np.dtype[Any]]
Inputs = dict[str, Array]  # by name; floating-point inputs have gradients, ids have none
Gradients = dict[str, Array]


class Shape(NamedTuple):
    """The sizes of a component's inputs: batch, tokens, channels, heads, vocabulary."""

    B: int
    T: int
    C: int
    H: int
    V: int

    @property
    def config(self) -> GPT2Config:
        """The config of a model with one layer of this shape, without dropout."""
        return GPT2Config(
            vocab_size=self.V, n_positions=self.T, n_embd=self.C, n_head=self.H, n_layer=1,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        )  # fmt: skip


# Shapes in which swapped axes show: B = T, sizes of 1, odd numbers, more heads than channels per head.
SHAPES = (Shape(2, 5, 12, 3, 11), Shape(4, 4, 8, 2, 7), Shape(1, 1, 4, 1, 2), Shape(3, 7, 10, 5, 5), Shape(6, 2, 6, 6, 13))
_DIRECTIONS = 3  # random directions per input for the central differences


@dataclass(frozen=True)
class Component:
    """One function of GPT-2 in each engine that has it.

    `numpy` returns the output and its backward function, which maps dL/d(output) to dL/d(input) for each input by name.
    """

    name: str
    inputs: Callable[[Shape, np.random.Generator], Inputs]
    torch: Callable[[dict[str, Tensor], Shape], Tensor]
    numpy: Callable[[Inputs, Shape], tuple[Any, Callable[[Any], Gradients]]] | None = None
    python: Callable[[dict[str, Any], Shape], Any] | None = None
    transformers: Callable[[dict[str, Tensor], Shape], Tensor] | None = None

    def checks(self) -> Iterator[Check]:
        """One check for each pair of engines, direction and dtype. transformers is left out if it is not installed."""
        if self.numpy is not None:
            for dtype, tolerance in BY_DTYPE.items():
                yield Check(f"{self.name}, forward", "NumPy", "PyTorch", dtype, tolerance, partial(self._forwards, dtype))
                yield Check(f"{self.name}, backward", "NumPy", "PyTorch", dtype, tolerance, partial(self._backwards, dtype))
            yield Check(
                f"{self.name}, backward", "NumPy", "central differences", "float64", DIFFERENCES, self._central_differences
            )
        if self.python is not None:
            yield Check(f"{self.name}, forward", "Python", "PyTorch", "float64", FLOAT64, self._python_forwards)

        if self.transformers is not None and importlib.util.find_spec("transformers"):
            for dtype, tolerance in BY_DTYPE.items():
                names = ("PyTorch", "transformers", dtype, tolerance)
                yield Check(f"{self.name}, forward", *names, partial(self._transformers_forwards, dtype))
                yield Check(f"{self.name}, backward", *names, partial(self._transformers_backwards, dtype))

    def _cases(self, dtype: str) -> Iterator[tuple[str, Shape, Inputs, np.random.Generator]]:
        for shape in SHAPES:
            rng = np.random.default_rng(0)
            inputs = self.inputs(shape, rng)
            cast = {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in inputs.items()}
            yield f"shape {tuple(shape)}", shape, cast, rng

    def _forwards(self, dtype: str) -> Iterator[Pair]:
        assert self.numpy is not None
        for name, shape, inputs, _ in self._cases(dtype):
            yield name, self.numpy(inputs, shape)[0], self.torch(_tensors(inputs), shape)

    def _python_forwards(self) -> Iterator[Pair]:
        assert self.python is not None
        for name, shape, inputs, _ in self._cases("float64"):
            lists = {key: value.tolist() for key, value in inputs.items()}
            yield name, self.python(lists, shape), self.torch(_tensors(inputs), shape)

    def _backwards(self, dtype: str) -> Iterator[Pair]:
        assert self.numpy is not None
        for name, shape, inputs, rng in self._cases(dtype):
            out, backward = self.numpy(inputs, shape)
            d_out = rng.standard_normal(np.shape(out)).astype(dtype)
            tensors = _tensors(inputs, requires_grad=True)
            self.torch(tensors, shape).backward(torch.from_numpy(np.asarray(d_out)))
            gradients = backward(d_out)
            for key, tensor in tensors.items():
                if tensor.requires_grad:
                    yield f"{key} at {name}", gradients[key], tensor.grad

    def _transformers_forwards(self, dtype: str) -> Iterator[Pair]:
        assert self.transformers is not None
        for name, shape, inputs, _ in self._cases(dtype):
            yield name, self.torch(_tensors(inputs), shape).detach(), self.transformers(_tensors(inputs), shape).detach()

    def _transformers_backwards(self, dtype: str) -> Iterator[Pair]:
        assert self.transformers is not None
        for name, shape, inputs, rng in self._cases(dtype):
            ours, theirs = _tensors(inputs, requires_grad=True), _tensors(inputs, requires_grad=True)
            out = self.torch(ours, shape)
            d_out = torch.from_numpy(rng.standard_normal(tuple(out.shape)).astype(dtype))
            out.backward(d_out)
            self.transformers(theirs, shape).backward(d_out)
            for key, tensor in ours.items():
                yield f"{key} at {name}", tensor.grad, theirs[key].grad

    def _central_differences(self) -> Iterator[Pair]:
        """The gradient along random directions against the change of the loss sum(out * d_out) along them."""
        assert self.numpy is not None
        for name, shape, inputs, rng in self._cases("float64"):
            out, backward = self.numpy(inputs, shape)
            d_out = rng.standard_normal(np.shape(out))
            gradients = backward(d_out)
            for key in gradients:
                directions = [rng.standard_normal(inputs[key].shape) for _ in range(_DIRECTIONS)]
                losses = [
                    [
                        float(
                            np.sum(
                                self.numpy({**inputs, key: inputs[key] + sign * DIFFERENCE_STEP * direction}, shape)[0]
                                * d_out
                            )
                        )
                        for sign in (1, -1)
                    ]
                    for direction in directions
                ]
                slopes = [(above - below) / (2 * DIFFERENCE_STEP) for above, below in losses]
                yield f"{key} at {name}", [float(np.vdot(gradients[key], d)) for d in directions], slopes


def _tensors(inputs: Inputs, requires_grad: bool = False) -> dict[str, Tensor]:
    return {
        name: torch.tensor(value, requires_grad=requires_grad and value.dtype.kind == "f") for name, value in inputs.items()
    }


def normal(**shapes: tuple[str, ...]) -> Callable[[Shape, np.random.Generator], Inputs]:
    """Normally distributed inputs with the named axes: a letter is a size of the `Shape`, "3C" three times that size."""

    def draw(shape: Shape, rng: np.random.Generator) -> Inputs:
        return {name: rng.standard_normal([_size(axis, shape) for axis in axes]) for name, axes in shapes.items()}

    return draw


def _size(axis: str, shape: Shape) -> int:
    if axis == "D":
        return shape.C // shape.H
    return int(axis[:-1] or 1) * int(getattr(shape, axis[-1]))
