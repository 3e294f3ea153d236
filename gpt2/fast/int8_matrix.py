"""Blocks and head in int8 for many rows at once, on a CPU with matrix units for bytes (AMX), which oneDNN's kernel uses.

A prompt of 1,000 tokens takes less than half of the time that it takes with the kernel for single rows
(`quantization.kernels.int8_product`), which reads weights faster but does not use matrix units. Each row of inputs is
rounded to 127 steps on either side of zero, the last of them at the largest of its values. Where the operators are missing,
which are private to torch, the other kernel computes everything.
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
    """How many rows are to be multiplied this way. It must not depend on what ran before, for the roundings differ."""

    def __init__(self, limits: FastLimits = FAST) -> None:
        names = ("qlinear_prepack", "qlinear_pointwise")
        has_operators = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, name) for name in names)
        self._is_available = has_operators and uses_matrix_units(limits)
        self._prompt_rows, self._step_rows = limits.matrix_prompt_rows, limits.matrix_step_rows

    def pay(self, n_rows: int, *, is_prompt: bool) -> bool:
        """Whether it pays for this many rows of a prompt, or of a decode step."""
        return self._is_available and n_rows >= (self._prompt_rows if is_prompt else self._step_rows)


class MatrixBlocks:
    """All blocks of a model in int8, as `forward.run_blocks` computes them. It holds the weights as they are now.

    With `only_last`, `run` gives the last token alone: (B, 1, C).
    """

    def __init__(self, model: GPT2, limits: FastLimits = FAST, *, only_last: bool = False) -> None:
        self._blocks = [_MatrixBlock(block) for block in cast(list[Block], model.h)]
        self._rows_at_once, self._only_last = limits.matrix_rows_at_once, only_last

    def run(self, x: Tensor, past: int, mask: Tensor | None, caches: list[Tensor]) -> Tensor:
        """All blocks on the stream `x` (B, T, C) after `past` cached tokens: (B, T, C)."""
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
            else:  # what was computed from bytes is as rough as bfloat16, in which attention is faster
                q, k, v = heads.bfloat16()  # (B, H, T, D) each
            if self._only_last and cache is caches[-1]:  # of the others, nothing but keys and values is needed any more
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
    """The parts of a block."""

    def __init__(self, block: Block) -> None:
        self.norm_1, self.norm_2, self.scale = block.ln_1, block.ln_2, block.attn.scale
        self.c_attn, self.attn_proj = MatrixLinear(block.attn.c_attn), MatrixLinear(block.attn.c_proj)
        self.c_fc, self.mlp_proj = MatrixLinear(block.mlp.c_fc), MatrixLinear(block.mlp.c_proj)
        activation = block.mlp.activation
        self.activation: Callable[[Tensor], Tensor] = activation
        if activation is ACTIVATIONS["gelu_new"]:
            self.activation = rough_tanh_gelu


class MatrixLinear:
    """What `layer` computes for rows (N, n_in) of any floating-point dtype: (N, n_out) float32.

    Its weights stand in memory once more, as oneDNN wants them.
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
    """`F.gelu(x, approximate="tanh")` to six digits, in half of the time: torch's tanh takes longer than its sigmoid."""
    linear = x.new_full(x.shape[-1:], 2 * 0.7978845608028654)  # a row, for of a single number torch would be slower
    return torch.addcmul(linear, x, x, value=2 * 0.7978845608028654 * 0.044715).mul_(x).sigmoid_().mul_(x)
