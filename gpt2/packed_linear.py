"""What a layer multiplies by, arranged for the kernel that reads it fastest. It knows layers, not the model around them.

A product of few rows waits for the memory that the weights come from, so the layout of the weights decides its speed;
a product of many rows waits for the arithmetic, so its precision does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpt2.device import multiplies_bfloat16
from gpt2.model import Conv1D, TokenEmbedding
from gpt2.quantization import LIFT, Int8Linear

Linear = Callable[[Tensor], Tensor]

# From so many rows on, a CPU without matrix units for bfloat16 is faster in float32, the conversion of the weights included.
_ROWS_FOR_FLOAT32 = 256


def fast_linear(layer: nn.Module) -> Linear:
    """What `layer` computes for rows (N, n_in), as a function without the calls of a module.

    In float32, float64 and float16 it computes the same bits as the layer. For bfloat16 on a CPU the weights are packed, and
    sums may be rounded elsewhere.
    """
    if isinstance(layer, Conv1D):
        weight, bias = layer.weight, layer.bias
        if _can_pack(weight):
            return _packed(layer, weight.t(), bias)
        return lambda x: torch.addmm(bias, x, weight)
    if isinstance(layer, TokenEmbedding):
        return _packed(layer, layer.weight, None) if _can_pack(layer.weight) else layer.logits
    assert isinstance(layer, Int8Linear)
    return layer.on_rows()


def fast_norm_and_linear(norm: nn.LayerNorm, layer: nn.Module) -> tuple[Tensor, Tensor, Linear]:
    """The weight and bias of a norm and, for what comes out of it, what `layer` computes: together the same bits.

    The lift that int8 needs is in the weight and the bias here, instead of a product of its own.
    """
    if isinstance(layer, Int8Linear):
        return norm.weight.detach() * LIFT, norm.bias.detach() * LIFT, layer.on_rows(lifted=True)
    return norm.weight, norm.bias, fast_linear(layer)


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN takes it. The operators are private to torch; where they are missing, nothing is packed."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and not weight.is_inference()  # it has no version, by which a change would be noticed
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@dataclass(frozen=True)
class _PackedBfloat16:
    """A product in bfloat16 of weights that oneDNN has packed: two thirds of the time of `F.linear` for a single row."""

    weight: Tensor  # (n_out, n_in), a view of the layer's own
    bias: Tensor | None
    packed: Tensor
    product: Callable[..., Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] >= _ROWS_FOR_FLOAT32 and not multiplies_bfloat16():
            bias = None if self.bias is None else self.bias.float()
            return torch.nn.functional.linear(x.float(), self.weight.float(), bias).bfloat16()
        return self.product(x, self.packed, self.bias, "none", [], "")


# Packing takes as long as dozens of tokens, so it is kept for the next generation: by layer, with the state of its weights.
_kept: weakref.WeakKeyDictionary[nn.Module, tuple[object, Tensor]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _packed(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> _PackedBfloat16:
    state, kept = _state(weight), _kept.get(layer)
    if kept is None or kept[0] != state:
        kept = _kept[layer] = state, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
    product = torch.ops.mkldnn._linear_pointwise.default
    product = getattr(product, "_op", product)  # the same without a look at each argument in Python
    return _PackedBfloat16(weight.detach(), None if bias is None else bias.detach(), kept[1], product)


def _state(weight: Tensor) -> object:
    """Differs when the weights do. Their version misses what is written through `weight.data`; a sum of their bytes, eight
    at a time as whole numbers, does not."""
    numbers = (weight.t() if weight.t().is_contiguous() else weight.contiguous()).reshape(-1)
    n_whole = numbers.numel() // 4 * 4
    whole = numbers[:n_whole] if numbers.storage_offset() % 4 == 0 else numbers[:n_whole].clone()
    return weight.data_ptr(), weight._version, whole.view(torch.int64).sum().item(), numbers[n_whole:].tolist()
