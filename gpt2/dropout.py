"""Dropout (Srivastava et al. 2014), fast on a CPU. It depends on torch and NumPy, and works on plain tensors.

On a CPU, torch draws one Bernoulli variable after another, which takes a quarter of a small model's training step on two
cores. Here 16 random bits decide about each activation, and NumPy draws 64 bits at a time. On other devices, torch's own
dropout is used. `in_mode` turns dropout on or off for a while.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Random bits for each element. They represent p with an error of at most 2**-17. The kept elements are scaled by the rate
# that results, so the mean is exact.
_BITS = 16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Return `x` with each element zeroed with probability `p` and the others scaled up, so that the mean is unchanged.

    If not `training`, it returns `x` itself. The draws depend only on the state of torch's default generator.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # the draws are then fused with the neighbouring operations
        return F.dropout(x, p)
    threshold = _threshold(p)
    if threshold == 0:
        return x
    # Multiplying by bytes of 0 and 1 gives the values and gradients of masked_fill in a quarter of its time.
    return x.mul(_kept(x.shape, threshold)).mul_(_scale(threshold))


def attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, scale: float) -> Tensor:
    """Return the attention of q (B, H, T, D) to k and v (B, H, S, D), with dropout on its weights: (B, H, T, D).

    `mask` is boolean, (B or 1, 1, T, S), and True where a query may attend to a key. None is causal attention in which the
    last query is at the last key. On a CPU `scaled_dot_product_attention` has no fused kernel with dropout, so the steps
    are written out here.
    """
    T, S = q.shape[2], k.shape[2]
    if q.device.type != "cpu":
        is_causal = mask is None and T > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=is_causal, scale=scale)
    scores = (q * scale) @ k.transpose(-2, -1)  # (B, H, T, S)
    later = torch.ones(T, S, dtype=torch.bool).triu(1 + S - T)
    hidden = later if mask is None else ~mask
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    return dropout(weights, p, training=True) @ v


def _threshold(p: float) -> int:
    return min(round(p * (1 << _BITS)), (1 << _BITS) - 1)


def _scale(threshold: int) -> float:
    return (1 << _BITS) / ((1 << _BITS) - threshold)


def _kept(shape: torch.Size, threshold: int) -> Tensor:
    """Return a uint8 tensor of `shape` whose elements are 0 with probability `threshold` / 2**16, otherwise 1."""
    seed = int(torch.randint(2**62, ()).item())
    n = shape.numel()
    words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-n // 4), np.uint64)
    return torch.from_numpy((words.view(np.uint16)[:n] >= np.uint16(threshold)).view(np.uint8)).view(shape)


@contextlib.contextmanager
def in_mode(module: nn.Module, *, is_training: bool) -> Iterator[None]:
    """Set `module` and all of its parts to one mode, and at the end give each part the mode that it had.

    `module.train(before)` would give all parts the mode of the whole, for example to a part that is frozen in eval mode.
    """
    changed = [part for part in module.modules() if part.training != is_training]
    for part in changed:
        part.training = is_training
    try:
        yield
    finally:
        for part in changed:
            part.training = not is_training
