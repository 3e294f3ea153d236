"""The model that a file with rounded weights should compute, in PyTorch: the same rounding, applied to the original.

Int8 programs round the inputs of each product, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.formats.stored import Stored, nearest, rounded_as
from gpt2.model import GPT2, Conv1D, TokenEmbedding

Rounding = Callable[[Tensor], Tensor]


def by_matrix(x: Tensor) -> Tensor:
    """Round to 256 steps from the least to the largest number of `x` and 0, as ONNX's DynamicQuantizeLinear does."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = (high - low) / 255
    if not float(step):
        return x
    zero = (-low / step).round()
    return ((x / step).round().add(zero).clamp(0, 255) - zero) * step


def by_row(x: Tensor) -> Tensor:
    """Round each row to 127 steps from 0 to its largest number, as CTranslate2 does."""
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return (x * scale).round() / scale


class _RoundedEmbedding(TokenEmbedding):
    """A token embedding whose head rounds its inputs."""

    def __init__(self, weight: Tensor, rounding: Rounding) -> None:
        super().__init__(*weight.shape)
        self.weight, self._rounding = torch.nn.Parameter(weight), rounding

    def logits(self, hidden_states: Tensor) -> Tensor:
        return F.linear(self._rounding(hidden_states), self.weight)


@torch.no_grad()
def with_rounded_inputs(model: GPT2, stored: Sequence[Stored], rounding: Rounding) -> GPT2:
    """Return a copy of `model` with the stored weights, whose matrices multiply rounded inputs."""
    model = _with_weights(model, {each.name: each.values for each in stored})
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0]),))
    model.wte = _RoundedEmbedding(model.wte.weight, rounding)
    return model


def with_rounded_weights(model: GPT2, stored: Sequence[Stored]) -> GPT2:
    """Return a copy of `model` with its weights rounded as those of the file.

    Where programs choose the rounding, the file's numbers are taken, if they are a rounding of the model's.
    """
    state = model.state_dict()
    rounded: dict[str, Tensor] = {}
    for each in stored:
        same = nearest(each.name, state[each.name], each.kind) if each.grid is None else None
        rounded[each.name] = rounded_as(each, state[each.name]) if same is None else same
    return _with_weights(model, rounded)


@torch.no_grad()
def _with_weights(model: GPT2, weights: dict[str, Tensor]) -> GPT2:
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])
    return model
