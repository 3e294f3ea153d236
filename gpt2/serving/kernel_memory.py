"""Bound the memory of oneDNN's kernels. This module does not import torch, which must not be imported before the call."""

from __future__ import annotations

import os
import sys

# For each variable that sets a bound, its older names: if one of them is set, the user has chosen. oneDNN compiles a kernel
# for each shape of a product, and by default keeps 1,024. torch's layer above it, ideep, keeps as many of its own. Together
# they take 0.4 MB for each shape, and a server gets prompts of all lengths, so both caches would fill.
_BOUNDS: dict[str, tuple[str, ...]] = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": ("DNNL_PRIMITIVE_CACHE_CAPACITY",),
    "LRU_CACHE_CAPACITY": (),
}

# A pass uses at most five shapes, because all blocks have the same ones. So this is enough for 51 numbers of rows: the steps
# of running texts, and the parts of prompts beside them, which have at most 32 rows. Longer parts, while no text runs, may
# compile kernels again, which takes 0.3 to 0.6 ms for each shape.
_N_KERNELS = 256


def bound_kernel_memory() -> None:
    """Keep fewer kernels than torch would, unless the environment says how many. Does nothing after torch was imported."""
    if "torch" in sys.modules:
        return
    for name, older in _BOUNDS.items():
        if not any(other in os.environ for other in older):
            os.environ.setdefault(name, str(_N_KERNELS))
