"""Products of rows with int8 weights, by torch's kernels for bytes. It knows tensors, not modules.

On a CPU the products are torch's `quantized.linear_dynamic`, which also rounds each row of inputs to 256 steps between its
smallest and its largest value, so that bytes are multiplied by bytes. Several rows share those steps, except where
`int8_product_of_each` or `gpt2.fast.int8_matrix` multiplies them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.quantization import rounding

# For this many rows, what is computed on the way to bytes stays in the processor's cache.
ROWS_IN_CACHE = 1024

# torch's kernels for bytes, the fastest for a single row first. The first that this build of torch has is used.
ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")


def quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(n_out, n_in) in int8, and float32 (n_out,) by which its rows are to be multiplied."""
    parts = [_quantized_rows(part) for part in weight.split(ROWS_IN_CACHE)]
    return torch.cat([part for part, _ in parts]), torch.cat([scale for _, scale in parts])


def _quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=rounding.TINY) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def int8_product(
    x: Tensor,
    packed: torch.classes.quantized.LinearPackedParamsBase,  # type: ignore[name-defined]
    bias: Tensor | None,
    is_lifted: bool,
) -> Tensor:
    """Rows (N, n_in), which come times LIFT if `is_lifted`, by a packed weight that adds `bias`: (N, n_out)."""
    if x.size(0) == 1:
        of_one: Tensor = torch.ops.quantized.linear_dynamic(x if is_lifted else x * rounding.LIFT, packed)
        return of_one
    # All rows of a call share the 256 steps, so each is brought to the same size.
    size = x.abs().amax(1, keepdim=True).clamp_(min=rounding.TINY * rounding.LIFT)
    y: Tensor = torch.ops.quantized.linear_dynamic(x * (rounding.LIFT / size), packed)
    if is_lifted:
        size = size / rounding.LIFT
    return y.mul_(size) if bias is None else torch.lerp(bias, y, size)  # the kernel has added the bias to y


def int8_product_of_each(
    x: Tensor,
    packed: torch.classes.quantized.LinearPackedParamsBase,  # type: ignore[name-defined]
    bias: Tensor | None,
    units_and_sums: Tensor,
    is_lifted: bool,
) -> Tensor:
    """The bits that `int8_product` gives for each of the rows alone, where `rounds_each_alone`, and weights are read once.

    Steps are chosen as `ChooseQuantizationParams` in torch's `QuantUtils.h` chooses them, inputs rounded as fbgemm's
    `QuantizeAvx2` rounds them, and products come to numbers as in its `ReQuantizeForFloat`. The kernel multiplies whole
    steps with the zero point still in them, and its result is brought back to a whole number, from which the zero point
    comes off. Where that number is too large to be sure of, rows are multiplied one by one.
    """
    units, sums = units_and_sums.unbind()
    low, high = x.amin(1, keepdim=True).clamp_max_(0).double(), x.amax(1, keepdim=True).clamp_min_(0)
    step = (high - low).div_(255)
    zero = (low / step.clamp_min(rounding.TINY)).round_().neg_().float()
    step = step.float().clamp_min_(rounding.FINEST if is_lifted else rounding.FINEST / rounding.LIFT)
    # The kernel rounds it. Of two numbers a row, torch would be slow.
    x_in_steps = torch.addcmul(zero.expand_as(x).contiguous(), x, step.reciprocal())
    y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x_in_steps, 1.0, 0, packed)
    if bias is not None:
        y -= bias
    y.div_(units).round_()
    least, greatest = y.aminmax()
    if not (least.item() > -rounding.LARGEST_SUM and greatest.item() < rounding.LARGEST_SUM):
        return torch.cat([int8_product(row, packed, bias, is_lifted) for row in x.split(1)])
    y.addcmul_(zero, sums, value=-1)
    if not is_lifted:
        step *= rounding.LIFT
    return y.mul_(step * units) if bias is None else torch.addcmul(bias, y, step * units)


def plain_int8_product(x: Tensor, weight_int8: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same where there is no kernel: rows (N, n_in) by (n_out, n_in) bytes and their scales (n_out,)."""
    y = F.linear(x, weight_int8.to(x.dtype)) * scale
    return y if bias is None else y + bias


def packing_engine(engines: Sequence[str] = ENGINES) -> str | None:
    """The first of `engines` that this torch has, or None if it has none of them."""
    if not (hasattr(torch, "_make_per_channel_quantized_tensor") and hasattr(torch.ops.quantized, "linear_dynamic")):
        return None
    return next((name for name in engines if name in torch.backends.quantized.supported_engines), None)


def multiplies_given_steps(engines: Sequence[str] = ENGINES) -> bool:
    """Whether there is the operator for inputs in steps of the caller's choice. It takes only what fbgemm has packed."""
    has_operator = hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
    return has_operator and packing_engine(engines) in ("x86", "fbgemm")


def pack(weight_int8: Tensor, scale: Tensor, bias: Tensor | None, engine: str) -> torch.ScriptObject:
    """Weights (n_out, n_in), their scales (n_out,) and the bias as the kernels of `engine` want them."""
    with packing(engine):
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(weight_int8, scale.double() / rounding.LIFT, zeros, 0)
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(quantized, bias)
        return packed


@contextmanager
def packing(engine: str) -> Iterator[None]:
    """The choice of kernels and the filter of warnings are the process's: around threads, it is to stand around them all."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch means to remove these operators: `packing_engine` looks for them
            yield
    finally:
        torch.backends.quantized.engine = before
