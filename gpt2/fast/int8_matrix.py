"""Blocks and head in int8 for many rows at once, on a CPU with matrix units for bytes (AMX), which oneDNN's kernel uses.

A prompt of 1,000 tokens takes less than half of the time that it takes with the kernel for single rows
(`quantization.int8_product`), which reads weights faster but knows no matrix units. Each row of inputs is rounded to 127
steps on either side of zero, the last of them at the largest of its values. Where the operators are missing, which are
private to torch, the other kernel does it all.
"""

from __future__ import annotations

import weakref
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.device import has_matrix_units
from gpt2.model import ACTIVATIONS, GPT2, Block
from gpt2.quantization.layers import Int8Linear

# From so many rows on: of prompts, which come once, and to arrange the weights takes as long as is saved for about 500 rows;
# and of decode steps, of which there are many. It must not depend on what ran before, for the roundings differ.
_MIN_PROMPT_ROWS, _MIN_STEP_ROWS = 128, 24

# What lies between two products of so many rows stays in the processor's cache.
_ROWS_IN_CACHE = 240

_TINY = torch.finfo(torch.float32).tiny

_kept: weakref.WeakKeyDictionary[nn.Module, tuple[object, Tensor]] = weakref.WeakKeyDictionary()


def pays(n_rows: int, *, is_prompt: bool) -> bool:
    """Whether so many rows are to be multiplied this way."""
    if n_rows < (_MIN_PROMPT_ROWS if is_prompt else _MIN_STEP_ROWS):
        return False
    names = ("qlinear_prepack", "qlinear_pointwise")
    return has_matrix_units() and torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, n) for n in names)


class MatrixBlocks:
    """All blocks of a model in int8, as `decode_plan.run_blocks` computes them. It holds the weights as they are now."""

    def __init__(self, model: GPT2) -> None:
        name = model.config.activation_function
        is_tanh_gelu = ACTIVATIONS[name] is ACTIVATIONS["gelu_new"]
        self._activation = rough_tanh_gelu if is_tanh_gelu else ACTIVATIONS[name]
        self._blocks: list[tuple[Block, MatrixLinear, MatrixLinear, MatrixLinear, MatrixLinear]] = []
        for block in cast(list[Block], model.h):
            attn = MatrixLinear(block.attn.c_attn), MatrixLinear(block.attn.c_proj)
            self._blocks.append((block, *attn, MatrixLinear(block.mlp.c_fc), MatrixLinear(block.mlp.c_proj)))

    def run(self, x: Tensor, past: int, mask: Tensor | None, caches: list[Tensor], *, only_last: bool = False) -> Tensor:
        """All blocks on the stream `x` (B, T, C) behind `past` cached tokens: (B, T, C), or (B, 1, C) with `only_last`."""
        B, T, C = x.shape
        is_causal = mask is None and T > 1
        x = x.view(B * T, C)
        qkv = x.new_empty(B * T, 3 * C)
        for (block, c_attn, attn_proj, c_fc, mlp_proj), cache in zip(self._blocks, caches, strict=True):
            shape = (B, T, 3, cache.shape[2], cache.shape[4])
            for rows, place in _in_parts(x, qkv):
                c_attn(block.ln_1(rows), out=place)
            heads = qkv.view(shape).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
            cache.narrow(3, past, T).copy_(heads[1:])
            if past:
                q, (k, v) = heads[0], cache.narrow(3, 0, past + T)
            else:  # what was computed from bytes is as rough as bfloat16, in which it is multiplied faster
                q, k, v = qkv.bfloat16().view(shape).permute(2, 0, 3, 1, 4)
            if only_last and cache is caches[-1]:  # of the others, nothing but keys and values is wanted any more
                x, q, mask = x.view(B, T, C)[:, -1], q[:, :, -1:], None if mask is None else mask[:, :, -1:]
                T, is_causal = 1, False
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=block.attn.scale)
            for rows, part in _in_parts(x, y.transpose(1, 2).reshape(B * T, C)):
                rows += attn_proj(part)
                rows += mlp_proj(self._activation(c_fc(block.ln_2(rows))))
        return x.view(B, T, C)


def _in_parts(x: Tensor, y: Tensor) -> zip[tuple[Tensor, Tensor]]:
    return zip(x.split(_ROWS_IN_CACHE), y.split(_ROWS_IN_CACHE), strict=True)


class MatrixLinear:
    """What `layer` computes for rows (N, n_in) of any floating-point dtype: (N, n_out) float32.

    Its weights stand in memory once more, as oneDNN wants them, and are kept as long as the layer's packed ones are.
    """

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, Int8Linear)
        packed, kept = layer.packed_weight(), _kept.get(layer)
        if kept is None or kept[0] is not packed:
            kept = _kept[layer] = packed, torch.ops.onednn.qlinear_prepack(layer.weight_int8, None)
        self._weight, self._scale, self._bias = kept[1], layer.scale, layer.bias
        self._zeros = torch.zeros(len(layer.scale), dtype=torch.int32, device="cpu")

    def __call__(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        size = torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_())
        step = size.float().clamp_(min=127 * _TINY) / 127
        steps = (x * step.reciprocal()).round_().to(torch.int8)
        product = torch.ops.onednn.qlinear_pointwise
        weight = self._weight, self._scale, self._zeros
        y = product(steps, 1.0, 0, *weight, None, 1.0, 0, torch.float32, "none", [], "")
        return y.mul_(step) if self._bias is None else torch.addcmul(self._bias, y, step, out=out)


def rough_tanh_gelu(x: Tensor) -> Tensor:
    """`F.gelu(x, approximate="tanh")` to six digits, in half of the time: torch's tanh takes longer than its sigmoid."""
    linear = x.new_full(x.shape[-1:], 2 * 0.7978845608028654)  # a row, for of a single number torch would be slower
    return torch.addcmul(linear, x, x, value=2 * 0.7978845608028654 * 0.044715).mul_(x).sigmoid_().mul_(x)
