"""Layers of int8 weights that stand in place of `Conv1D` and `TokenEmbedding`. They know no model."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.quantization.kernels import (
    LARGEST_BIAS,
    LIFT,
    int8_product,
    int8_product_of_each,
    multiplies_given_steps,
    pack,
    packing,
    packing_engine,
    plain_int8_product,
)


class Int8Linear(nn.Module):
    """y = x W^T + b of x (..., n_in) float32, with W = weight_int8 (n_out, n_in) times scale (n_out,)."""

    weight_int8: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_int8: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight_int8", weight_int8)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self._packed: tuple[object, torch.ScriptObject] | None = None  # with what it was made of
        self._units_and_sums: tuple[torch.ScriptObject | None, Tensor | None] | None = None  # with what is packed

    def forward(self, x: Tensor) -> Tensor:
        packed, rows = self.packed_weight(), x.reshape(-1, x.shape[-1])
        if packed is None:
            y = plain_int8_product(rows, self.weight_int8, self.scale, self.bias)
        else:
            y = int8_product(rows, packed, self.bias, False)
        return y.view(*x.shape[:-1], -1)

    def packed_weight(self) -> torch.ScriptObject | None:
        """The weights as the CPU's kernel wants them, or None where there is no such kernel."""
        if self.weight_int8.device.type != "cpu":
            return None
        sources = [tensor for tensor in (self.weight_int8, self.scale, self.bias) if tensor is not None]
        state = [(tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in sources]
        if self._packed is None or self._packed[0] != state:
            engine = packing_engine()
            if engine is None:
                return None
            self._packed = (state, pack(self.weight_int8, self.scale, self.bias, engine))
        return self._packed[1]

    @property
    def is_packed(self) -> bool:
        """Whether `packed_weight` has been asked before."""
        return self._packed is not None

    def units_and_sums(self) -> Tensor | None:
        """What `int8_product_of_each` wants of the packed weights, (2, n_out): their scales, and sums of their rows.

        None where it would not keep its promise: with other kernels, and with a bias beside which weights vanish.
        """
        packed = self.packed_weight()
        if self._units_and_sums is None or self._units_and_sums[0] is not packed:
            can_have = packed is not None and rounds_each_alone()
            self._units_and_sums = packed, self._find_units_and_sums(packed) if can_have else None
        return self._units_and_sums[1]

    def _find_units_and_sums(self, packed: torch.ScriptObject | None) -> Tensor | None:
        units = (self.scale.double() / LIFT).float()
        if self.bias is not None and bool((self.bias.abs() > LARGEST_BIAS * units).any()):
            return None
        ones = torch.ones(1, self.weight_int8.shape[1], dtype=torch.float32, device="cpu")
        sums = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(ones, 1.0, 0, packed)
        if self.bias is not None:
            sums -= self.bias
        return torch.stack([units, sums[0].div_(units).round_()])


class Int8Embedding(Int8Linear):
    """Token vectors (V, C) in int8, each with its scale; also the head, as in `TokenEmbedding`."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight_int8) * F.embedding(input_ids, self.scale[:, None])

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(..., C) to (..., V)."""
        return super().forward(hidden_states)


def rounds_each_alone() -> bool:
    """Whether `int8_product_of_each` is to be had, and keeps its promise here."""
    return multiplies_given_steps() and _rounds_alike()


@functools.cache
def _rounds_alike() -> bool:
    """It depends on where those who built torch let a multiplication and an addition be rounded as one."""
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (150, 90), dtype=torch.int8, generator=numbers, device="cpu")
    scale, bias = torch.rand(2, 150, dtype=torch.float32, generator=numbers, device="cpu")
    layer = Int8Linear(weight, scale + 0.1, bias)
    x = torch.randn(9, 90, dtype=torch.float32, generator=numbers, device="cpu") * 100
    packed = layer.packed_weight()
    units_and_sums = layer._find_units_and_sums(packed)
    assert units_and_sums is not None  # with a bias as small as this
    alone = torch.cat([int8_product(row, packed, bias, True) for row in x.split(1)])
    return torch.equal(int8_product_of_each(x, packed, bias, units_and_sums, True), alone)


def pack_together(model: nn.Module) -> None:
    """Pack the layers that are not yet packed, several at a time, for one of them keeps no more than one thread busy."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear) and not module.is_packed]
    engine = packing_engine()
    if engine is None or len(layers) < 2 or layers[0].weight_int8.device.type != "cpu":
        return
    layers.sort(key=lambda layer: layer.weight_int8.numel(), reverse=True)  # the head takes as long as all blocks
    with packing(engine), ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
        list(pool.map(Int8Linear.packed_weight, layers))
