"""What a decode plan holds of a model, as arguments of the functions that TorchScript runs. It knows nothing of them.

Without `from __future__ import annotations`, because TorchScript needs the types of these fields, not their names.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class FastLinear(NamedTuple):
    """What a layer multiplies rows by, as `linear.product` takes it. What the fields hold, by `kind`:

    - "float": `weight` (n_in, n_out), `bias` (1, n_out). "float head": `weight` (n_out, n_in), no bias.
    - "bfloat16": `weight` as oneDNN packs it, `bias` (n_out,).
    - "bfloat16 or float32": the same, and from `rows_for_float32` on `other`, the weight (n_out, n_in) itself.
    - "int8": `packed`, which adds `bias` (n_out,); the layer's `units_and_sums` in `other`, for `product_of_each`.
      "lifted int8": the same, of rows that come times LIFT.
    - "plain int8", where there is no kernel: `weight` (n_out, n_in), `bias` (n_out,), the weight's scales in `other`.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    other: Tensor
    packed: Optional[torch.classes.quantized.LinearPackedParamsBase]  # type: ignore[name-defined]  # noqa: UP045
    rows_for_float32: int


class Norm(NamedTuple):
    """A layer norm."""

    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    eps: float


class BlockParts(NamedTuple):
    """One block, in the order in which it computes."""

    norm_1: Norm
    c_attn: FastLinear
    scale: float  # of attention
    attn_proj: FastLinear
    norm_2: Norm
    c_fc: FastLinear
    activation: str  # "tanh" or "none", as F.gelu calls its approximations, or "relu"
    mlp_proj: FastLinear


class Ends(NamedTuple):
    """What stands before the blocks and after them."""

    wte: Tensor  # (V, C)
    row_scales: Tensor | None  # (V, 1), in int8: what its rows are to be multiplied by
    wpe: Tensor  # (n_positions, C)
    norm: Norm  # the last one
    head: FastLinear


class PlanParts(NamedTuple):
    """A whole model."""

    blocks: list[BlockParts]
    ends: Ends
