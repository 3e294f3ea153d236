"""PlanParts: the weights of a decode plan, as arguments of the functions that TorchScript runs. It depends on torch only.

It has no `from __future__ import annotations`, because TorchScript needs the types of these fields, not their names.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class FastLinear(NamedTuple):
    """A linear layer, as an argument of `linear.product`. `kind` decides which fields are used:

    - "float": `weight` (n_in, n_out) and `bias` (1, n_out).
    - "float head": `weight` (n_out, n_in), no bias.
    - "float without MKL", "float head without MKL": the same; `other` is the weight of a product of one row, in parts.
    - "packed float32": `weight` packed by oneDNN, and `bias` (n_out,) if the layer has one.
    - "bfloat16": the same; from `many_rows` rows on, `other`, the weight (n_out, n_in), is multiplied in float32.
    - "float16": `packed` by fbgemm, and `bias` (n_out,) if the layer has one; from `many_rows` rows on, torch multiplies by
      `other`, the weight (n_out, n_in).
    - "bfloat16 by float16": a single row like "float16", several like "bfloat16", also with a `weight` that is not packed.
    - "bfloat16 row by row", "float16 row by row": the same, but `product_of_each` multiplies one row after another.
    - "int8": `packed`, of which the parts include `bias` (n_out,); `other` is the layer's `units_and_sums`, for
      `product_of_each`, and `n_steps` is the number of steps to which inputs are rounded.
    - "lifted int8": like "int8", for input rows multiplied by LIFT.
    - "plain int8", without a kernel: `weight` (n_out, n_in) and `bias` (n_out,); `other` is the weight's scales (n_out,).
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    other: Tensor
    packed: Optional[list[torch.classes.quantized.LinearPackedParamsBase]]  # type: ignore[name-defined]  # noqa: UP045
    many_rows: int = 0
    rows_to_activate: int = 2**31  # from this many rows on, oneDNN applies the activation after the layer
    n_steps: int = 0


class Norm(NamedTuple):
    """A layer norm."""

    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    eps: float


class BlockParts(NamedTuple):
    """One block, in the order of its computation."""

    norm_1: Norm
    c_attn: FastLinear
    scale: float  # of attention
    attn_proj: FastLinear
    norm_2: Norm
    c_fc: FastLinear
    activation: str  # "tanh" or "none", the approximations of F.gelu, or "relu"
    mlp_proj: FastLinear


class Ends(NamedTuple):
    """The layers before and after the blocks."""

    wte: Tensor  # (V, C)
    row_scales: Tensor | None  # (V, 1): the scales of the rows of an int8 `wte`
    wpe: Tensor  # (n_positions, C)
    norm: Norm  # ln_f
    head: FastLinear


class PlanParts(NamedTuple):
    """A whole model."""

    blocks: list[BlockParts]
    ends: Ends
