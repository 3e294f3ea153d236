"""HeadBytes: the data of a `GreedyHead`, as an argument of the function that TorchScript runs. It depends on torch only.

It has no `from __future__ import annotations`, because TorchScript needs the types of these fields, not their names.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class HeadBytes(NamedTuple):
    """The weights (V, C) in int8, and their rounding errors. Packed scales are divided by LIFT, and so are all lengths."""

    packed: list[torch.classes.quantized.LinearPackedParamsBase]  # type: ignore[name-defined]  # parts, for the kernel
    radius: Tensor  # (V,) float32: the Euclidean length of each row's rounding errors
    largest_radius: float  # the maximum of `radius`
    longest: float  # the Euclidean length of the longest row of int8 weights times scale
    eps: float  # the relative rounding error of a logit in its dtype
    smallest: float  # the smallest normal number of that dtype, down to which `eps` holds
