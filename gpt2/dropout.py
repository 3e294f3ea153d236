"""Dropout (Srivastava et al. 2014) at the speed of a CPU. It knows tensors, and no model.

torch draws a Bernoulli variable for each activation, one by one: a quarter of a small model's training step on two cores.
Here sixteen random bits decide on each, and numpy draws them four at a time. On other devices it is torch's own.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BITS = 16  # so p is met to within 2**-17; what is kept is scaled by the rate that is met, so the mean is exact


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`x` with each element zeroed with probability `p` and the others scaled up, so that the mean stays.

    What is drawn depends on torch's seed alone.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # there the draws are fused into what surrounds them
        return F.dropout(x, p)
    threshold = _threshold(p)
    if threshold == 0:
        return x
    # A product with bytes of 0 and 1: the same as masked_fill, at a quarter of its time, and so are the gradients.
    return x.mul(_kept(x.shape, threshold)).mul_(_scale(threshold))


def attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, scale: float) -> Tensor:
    """Attention of q (B, H, T, D) to k and v (B, H, S, D), with dropout on its weights: (B, H, T, D).

    `mask` is True where a query may look; None is all up to itself, the last query being at the last key. On a CPU
    `scaled_dot_product_attention` has no fused kernel for dropout, so it is written out here.
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
    """Bytes (uint8) for the elements of `shape`: 0 with probability `threshold` / 2**16, otherwise 1."""
    seed = int(torch.randint(2**62, ()).item())
    n = shape.numel()
    words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-n // 4), np.uint64)
    return torch.from_numpy((words.view(np.uint16)[:n] >= np.uint16(threshold)).view(np.uint8)).view(shape)
