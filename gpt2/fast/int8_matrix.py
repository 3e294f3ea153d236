"""Blocks and head in int8 for many rows, on a CPU with matrix units for int8 (AMX). It depends on oneDNN's kernel in torch.

A prompt of 1,000 tokens takes less than half of the time of the kernel for single rows, which reads weights faster but does
not use matrix units (`quantization.kernels.int8_product`). Each row of inputs is rounded to steps from -127 to 127, and its
largest absolute value becomes 127. The operators are private to torch; if they are missing, the other kernel computes
everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.fast.forward import stored
from gpt2.fast.limits import FAST, FastLimits
from gpt2.fast.linear import uses_matrix_units
from gpt2.model import ACTIVATIONS, GPT2, Block
from gpt2.quantization import rounding
from gpt2.quantization.derived import Derived, state_of
from gpt2.quantization.layers import Int8Linear

_arranged: Derived[Tensor] = Derived()


class MatrixRows:
    """Decides how many rows are multiplied in this way.

    The decision must not depend on earlier calls, because the two kernels round differently.
    """

    def __init__(self, limits: FastLimits = FAST) -> None:
        names = ("qlinear_prepack", "qlinear_pointwise")
        has_operators = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, name) for name in names)
        self._is_available = has_operators and uses_matrix_units(limits)
        self._prompt_rows, self._step_rows = limits.matrix_prompt_rows, limits.matrix_step_rows

    def pay(self, n_rows: int, *, is_prompt: bool) -> bool:
        """Return whether this kernel is available, and faster for this many rows of a prompt or of a decode step."""
        return self._is_available and n_rows >= (self._prompt_rows if is_prompt else self._step_rows)


class MatrixBlocks:
    """All blocks of an int8 model, as `forward.run_blocks` computes them, with the weights that the model has now.

    With `only_last`, `run` returns only the last token, (B, 1, C).
    """

    def __init__(self, model: GPT2, limits: FastLimits = FAST, *, only_last: bool = False) -> None:
        self._blocks = [_MatrixBlock(block) for block in cast(list[Block], model.h)]
        self._rows_at_once, self._only_last = limits.matrix_rows_at_once, only_last

    def run(self, x: Tensor, past: int, mask: Tensor | None, caches: list[Tensor]) -> Tensor:
        """Run all blocks on the residual stream `x` (B, T, C) after `past` cached tokens. Returns (B, T, C)."""
        B, T, C = x.shape
        is_causal = mask is None and T > 1
        x = x.view(B * T, C)  # a row for each token
        qkv = x.new_empty(B * T, 3 * C)
        for block, cache in zip(self._blocks, caches, strict=True):
            for rows, place in self._in_parts(x, qkv):
                block.c_attn(block.norm_1(rows), out=place)
            heads = stored(qkv, T, past, cache)  # (3, B, H, T, D)
            if past:
                q, (k, v) = heads[0], cache.narrow(3, 0, past + T)  # (B, H, T, D) and (B, H, S, D) each
            else:  # int8 products are about as coarse as bfloat16, in which attention is faster
                q, k, v = heads.bfloat16()  # (B, H, T, D) each
            if self._only_last and cache is caches[-1]:  # from here on, the other tokens are not needed
                x, q, mask = x.view(B, T, C)[:, -1], q[:, :, -1:], None if mask is None else mask[:, :, -1:]
                T, is_causal = 1, False
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=block.scale)
            y = y.transpose(1, 2).reshape(B * T, C)  # a row for each token
            for rows, part in self._in_parts(x, y):
                rows += block.attn_proj(part)
                rows += block.mlp_proj(block.activation(block.c_fc(block.norm_2(rows))))
        return x.view(B, T, C)

    def _in_parts(self, x: Tensor, y: Tensor) -> zip[tuple[Tensor, Tensor]]:
        return zip(x.split(self._rows_at_once), y.split(self._rows_at_once), strict=True)


class _MatrixBlock:
    """The layers of one block, with int8 layers packed for matrix units."""

    def __init__(self, block: Block) -> None:
        self.norm_1, self.norm_2, self.scale = block.ln_1, block.ln_2, block.attn.scale
        self.c_attn, self.attn_proj = MatrixLinear(block.attn.c_attn), MatrixLinear(block.attn.c_proj)
        self.c_fc, self.mlp_proj = MatrixLinear(block.mlp.c_fc), MatrixLinear(block.mlp.c_proj)
        activation = block.mlp.activation
        self.activation: Callable[[Tensor], Tensor] = activation
        if activation is ACTIVATIONS["gelu_new"]:
            self.activation = rough_tanh_gelu


class MatrixLinear:
    """Computes `layer` for rows (N, n_in) of any floating-point dtype. Returns (N, n_out) float32.

    It keeps a second copy of the weights in memory, in oneDNN's layout.
    """

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, Int8Linear)
        self._scale, self._bias = layer.scale, layer.bias
        self._weight = _arranged.of(layer, state_of(layer.weight_int8), lambda: _arrange(layer.weight_int8))
        self._zeros = torch.zeros(len(layer.scale), dtype=torch.int32, device="cpu")

    def __call__(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        size = torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_())
        step = size.float().clamp_(min=127 * rounding.TINY) / 127
        x_in_steps = (x * step.reciprocal()).round_().to(torch.int8)
        product = torch.ops.onednn.qlinear_pointwise
        weight = self._weight, self._scale, self._zeros
        y: Tensor = product(x_in_steps, 1.0, 0, *weight, None, 1.0, 0, torch.float32, "none", [], "")
        return y.mul_(step) if self._bias is None else torch.addcmul(self._bias, y, step, out=out)


def _arrange(weight_int8: Tensor) -> Tensor:
    arranged: Tensor = torch.ops.onednn.qlinear_prepack(weight_int8, None)
    return arranged


def rough_tanh_gelu(x: Tensor) -> Tensor:
    """Return `F.gelu(x, approximate="tanh")` to six digits, in half of the time: torch's sigmoid is faster than its tanh."""
    linear = x.new_full(x.shape[-1:], 2 * 0.7978845608028654)  # a row, because torch is slower with a single number
    return torch.addcmul(linear, x, x, value=2 * 0.7978845608028654 * 0.044715).mul_(x).sigmoid_().mul_(x)
