"""What a decode plan holds of a model, as arguments of the functions that TorchScript runs. It knows nothing of them.

Without `from __future__ import annotations`, for TorchScript wants the types of these fields, not their names.
"""

from typing import NamedTuple

from torch import Tensor


class Blocks(NamedTuple):
    """All blocks. Every list has an entry a block, and in it, from `kinds` on, an argument of `product` for each of the four
    products, in the order in which they come."""

    norms: list[list[Tensor]]  # weight and bias of the first norm and of the second
    scales: list[float]  # of attention
    kinds: list[list[str]]
    weights: list[list[Tensor]]
    biases: list[list[Tensor | None]]
    others: list[list[Tensor]]
    activation: str
    eps: float  # of all norms


class Ends(NamedTuple):
    """What stands before the blocks and behind them, but for the head."""

    wte: Tensor  # (V, C)
    row_scales: Tensor | None  # (V, 1), in int8: what its rows are to be multiplied by
    wpe: Tensor  # (n_positions, C)
    norm_weight: Tensor  # of the last norm
    norm_bias: Tensor
