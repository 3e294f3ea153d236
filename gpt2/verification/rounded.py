"""The model that a file with rounded weights should compute, in PyTorch: the same rounding, applied to the original.

Int8 programs round the inputs of each product, too. Where programs choose their rounding freely, the change of the logits is
estimated from errors of the same sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.formats.stored import Stored, nearest
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


def with_rounded_weights(model: GPT2, stored: Sequence[Stored]) -> GPT2 | None:
    """Return a copy of `model` with its weights rounded as those of the file, or None if programs differ in the rounding."""
    state = model.state_dict()
    rounded = {each.name: nearest(each.name, state[each.name], each.kind) for each in stored}
    if any(tensor is None for tensor in rounded.values()):
        return None
    return _with_weights(model, {name: tensor for name, tensor in rounded.items() if tensor is not None})


def with_errors_of_other_signs(model: GPT2, stored: Sequence[Stored], seed: int) -> GPT2:
    """Return a copy of `model` with the errors of the stored weights, each with a random sign."""
    generator, state = torch.Generator().manual_seed(seed), model.state_dict()
    weights = {}
    for each in stored:
        signs = torch.randint(0, 2, each.values.shape, generator=generator) * 2 - 1
        weights[each.name] = state[each.name] + (each.values - state[each.name]) * signs
    return _with_weights(model, weights)


@torch.no_grad()
def _with_weights(model: GPT2, weights: dict[str, Tensor]) -> GPT2:
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])
    return model
