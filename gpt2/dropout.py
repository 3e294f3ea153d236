"""Dropout (Srivastava et al. 2014) at the speed of a CPU. It knows tensors, and where a model keeps its rates.

torch draws a Bernoulli variable for each activation, one by one: a quarter of a small model's training step on two cores.
Here sixteen random bits decide on each, and numpy draws them four at a time. On other devices it is torch's own.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from gpt2.model import GPT2, Block

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

    `mask` is True where a query may look. None is causal, T then being S. On a CPU
    `scaled_dot_product_attention` has no fused kernel for dropout, so it is written out here.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=mask is None, scale=scale)
    scores = (q * scale) @ k.transpose(-2, -1)  # (B, H, T, S)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    hidden = later if mask is None else ~mask
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    return dropout(weights, p, training=True) @ v


def set_dropout(model: GPT2, rate: float) -> None:
    """Let `model` drop with `rate` everywhere from now on, in training mode."""
    model.config = dataclasses.replace(model.config, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)
    for block in cast("list[Block]", model.h):
        block.attn.attn_pdrop = block.attn.resid_pdrop = block.mlp.resid_pdrop = rate


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
