"""What a `GreedyHead` holds of a head, as an argument of the function that TorchScript runs. It knows nothing of it.

Without `from __future__ import annotations`, because TorchScript needs the types of these fields, not their names.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class HeadBytes(NamedTuple):
    """The weights (V, C) in bytes, with what they leave out. Packed scales are lowered by LIFT, so all lengths are, too."""

    packed: list[torch.classes.quantized.LinearPackedParamsBase]  # type: ignore[name-defined]  # for the kernel, in parts
    radius: Tensor  # (V,) float32: the length of each row's rounding errors
    largest_radius: float
    longest: float  # the length of the longest row of bytes times scale
    eps: float  # the relative error of a logit in its dtype
    smallest: float  # the smallest number that it holds for
