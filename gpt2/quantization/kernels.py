"""Products of rows with int8 weights, by torch's int8 kernels. It depends on tensors, not on modules.

On a CPU, the products are torch's `quantized.linear_dynamic`. It also rounds the inputs to 255 steps between their smallest
and their largest value (127 on older processors, see `input_steps`), and multiplies int8 by int8. All rows of a call share
these steps, except in `int8_product_of_each` and `gpt2.fast.int8_matrix`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.quantization import rounding

# Rows that are quantized together. Intermediate results of this many rows stay in the processor's cache.
ROWS_IN_CACHE = 1024

# Rows of a weight that are packed together. fbgemm reads the weight column by column, and so few rows stay in the cache: the
# 50,257 rows of GPT-2's head take 0.69 s in one piece and 0.36 s in parts, and are multiplied as fast.
ROWS_OF_PART = 6400

# torch's int8 kernels, the fastest for a single row first. The first one that this build of torch has is used.
ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")


def quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize `weight` (n_out, n_in). Returns int8 (n_out, n_in), and the scale of each row, float32 (n_out,)."""
    parts = [_quantized_rows(part) for part in weight.split(ROWS_IN_CACHE)]
    return torch.cat([part for part, _ in parts]), torch.cat([scale for _, scale in parts])


def _quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=rounding.TINY) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def int8_product(
    x: Tensor,
    packed: list[torch.classes.quantized.LinearPackedParamsBase],  # type: ignore[name-defined]
    bias: Tensor | None,
    is_lifted: bool,
    n_steps: int,
) -> Tensor:
    """Return the product (N, n_out) of rows (N, n_in) and a weight that `pack` has packed with `bias`.

    If `is_lifted`, the rows have been multiplied by LIFT. `n_steps` is that of `input_steps`.
    """
    has_few_steps = n_steps < rounding.MOST_STEPS
    if x.size(0) == 1:
        return _dynamic_product(x if is_lifted else x * rounding.LIFT, packed, has_few_steps)
    # All rows of a call share the steps, so scale each row to the same size.
    size = x.abs().amax(1, keepdim=True).clamp_(min=rounding.TINY * rounding.LIFT)
    y = _dynamic_product(x * (rounding.LIFT / size), packed, has_few_steps)
    if is_lifted:
        size = size / rounding.LIFT
    return y.mul_(size) if bias is None else torch.lerp(bias, y, size)  # the kernel has added the bias to y


def _dynamic_product(
    x: Tensor,
    packed: list[torch.classes.quantized.LinearPackedParamsBase],  # type: ignore[name-defined]
    has_few_steps: bool,
) -> Tensor:
    """Return the product of the kernel, which chooses the steps of the inputs: the same for each part."""
    if len(packed) == 1:
        whole: Tensor = torch.ops.quantized.linear_dynamic(x, packed[0], has_few_steps)
        return whole
    return torch.cat([torch.ops.quantized.linear_dynamic(x, part, has_few_steps) for part in packed], 1)


def product_of_steps(
    x_in_steps: Tensor,
    packed: list[torch.classes.quantized.LinearPackedParamsBase],  # type: ignore[name-defined]
) -> Tensor:
    """Return the product of inputs that are integers, which the kernel need not round."""
    if len(packed) == 1:
        whole: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x_in_steps, 1.0, 0, packed[0])
        return whole
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return torch.cat([multiply(x_in_steps, 1.0, 0, part) for part in packed], 1)


def int8_product_of_each(
    x: Tensor,
    packed: list[torch.classes.quantized.LinearPackedParamsBase],  # type: ignore[name-defined]
    bias: Tensor | None,
    units_and_sums: Tensor,
    is_lifted: bool,
    n_steps: int,
) -> Tensor:
    """Return for each row the bits that `int8_product` gives for this row only, but read the weights once for all rows.

    Call it only if `layers.rounds_each_alone`. Steps are chosen as in `ChooseQuantizationParams` of torch's `QuantUtils.h`,
    inputs are rounded as in fbgemm's `QuantizeAvx2`, and results are scaled as in its `ReQuantizeForFloat`. The kernel
    multiplies steps that still include the zero point. Its result is rounded back to an integer, and the zero point is
    subtracted. If that integer is too large for exact rounding, rows are multiplied one by one.
    """
    units, sums = units_and_sums.unbind()
    low, high = x.amin(1, keepdim=True).clamp_max_(0).double(), x.amax(1, keepdim=True).clamp_min_(0)
    step = (high - low).div_(n_steps)
    zero = (low / step.clamp_min(rounding.TINY)).round_().neg_().float()
    step = step.float().clamp_min_(rounding.FINEST if is_lifted else rounding.FINEST / rounding.LIFT)
    # The kernel rounds it. `zero` is expanded first, because `addcmul` is slow with two operands of one number per row.
    x_in_steps = torch.addcmul(zero.expand_as(x).contiguous(), x, step.reciprocal())
    y = product_of_steps(x_in_steps, packed)
    if bias is not None:
        y -= bias
    y.div_(units).round_()
    least, greatest = y.aminmax()
    if not (least.item() > -rounding.LARGEST_SUM and greatest.item() < rounding.LARGEST_SUM):
        return torch.cat([int8_product(row, packed, bias, is_lifted, n_steps) for row in x.split(1)])
    y.addcmul_(zero, sums, value=-1)
    if not is_lifted:
        step *= rounding.LIFT
    return y.mul_(step * units) if bias is None else torch.addcmul(bias, y, step * units)


def plain_int8_product(x: Tensor, weight_int8: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Like `int8_product`, without a kernel: rows (N, n_in) times int8 weights (n_out, n_in) and scales (n_out,)."""
    y = F.linear(x, weight_int8.to(x.dtype)) * scale
    return y if bias is None else y + bias


def packing_engine(engines: Sequence[str] = ENGINES) -> str | None:
    """Return the first of `engines` that this build of torch has, or None if it has none of them."""
    if not (hasattr(torch, "_make_per_channel_quantized_tensor") and hasattr(torch.ops.quantized, "linear_dynamic")):
        return None
    return next((name for name in engines if name in torch.backends.quantized.supported_engines), None)


@functools.cache
def input_steps(engine: str) -> int:
    """Return to how many steps inputs are rounded for the kernels of `engine`: 255, or 127 if these would overflow.

    Processors without VNNI instructions (x86 before 2019, and several later) add pairs of products in 16 bits, where
    255 * 127 + 255 * 127 overflows and 127 * 127 + 127 * 127 does not. An example shows it.
    """
    weight = torch.full((1, 64), 127, dtype=torch.int8, device="cpu")
    packed = pack(weight, torch.ones(1, dtype=torch.float32, device="cpu"), None, engine)
    inputs = torch.ones(1, 64, dtype=torch.float32, device="cpu")
    overflows = int8_product(inputs, packed, None, False, rounding.MOST_STEPS).item() < 0.9 * 64 * 127
    return rounding.LEAST_STEPS if overflows else rounding.MOST_STEPS


def multiplies_given_steps(engines: Sequence[str] = ENGINES) -> bool:
    """Return whether torch has the operator for inputs with given steps. It needs weights packed by fbgemm."""
    has_operator = hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
    return has_operator and packing_engine(engines) in ("x86", "fbgemm")


def pack(weight_int8: Tensor, scale: Tensor, bias: Tensor | None, engine: str) -> list[torch.ScriptObject]:
    """Return int8 weights (n_out, n_in), their scales (n_out,) and the bias, packed for the kernels of `engine`.

    Each part of the list has at most ROWS_OF_PART of the n_out rows.
    """
    packed = []
    with packing(engine):
        for begin in range(0, len(scale), ROWS_OF_PART):
            rows = slice(begin, begin + ROWS_OF_PART)
            scales = scale[rows].double() / rounding.LIFT
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            quantized = torch._make_per_channel_quantized_tensor(weight_int8[rows], scales, zeros, 0)
            packed.append(torch.ops.quantized.linear_prepack(quantized, None if bias is None else bias[rows]))
    return packed


@contextmanager
def packing(engine: str) -> Iterator[None]:
    """Select torch's kernels for packing, and ignore warnings, until the block ends.

    Both are settings of the whole process. If several threads pack, enter it once around all of them.
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch will remove these operators, and `packing_engine` checks for them
            yield
    finally:
        torch.backends.quantized.engine = before
