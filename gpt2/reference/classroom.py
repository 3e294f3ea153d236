"""Two things that courses on transformers teach and GPT-2 does differently, tested against GPT-2. It knows arrays only.

Attention with separate projections for Q, K and V (GPT-2 has one for all three), and sinusoidal positions (GPT-2 learns
its position embeddings). No other module uses this one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from gpt_config.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]


class SeparateProjections(NamedTuple):
    """Weights (C, C) and biases (C,) of three linear layers, y = x W + b each."""

    q_weight: Array
    q_bias: Array
    k_weight: Array
    k_bias: Array
    v_weight: Array
    v_bias: Array


def separate_projections(c_attn_weight: Array, c_attn_bias: Array) -> SeparateProjections:
    """GPT-2's `c_attn`, weight (C, 3C) and bias (3C,), as three layers. InputError for other shapes.

    The first C columns of `c_attn` compute Q, the next C compute K, and the last C compute V.
    """
    n_embd = c_attn_weight.shape[0]
    if c_attn_weight.shape != (n_embd, 3 * n_embd) or c_attn_bias.shape != (3 * n_embd,):
        raise InputError(
            f"c_attn has a weight of shape {c_attn_weight.shape} and a bias of shape {c_attn_bias.shape}: GPT-2's are "
            "(C, 3C) and (3C,); transpose the weight of a torch.nn.Linear"
        )
    weights, biases = np.split(c_attn_weight, 3, axis=1), np.split(c_attn_bias, 3)
    return SeparateProjections(*(part.copy() for pair in zip(weights, biases, strict=True) for part in pair))


def fused_projection(separate: SeparateProjections) -> tuple[Array, Array]:
    """Weight (C, 3C) and bias (3C,) of `c_attn` from three layers: the exact inverse of `separate_projections`."""
    weight = np.concatenate([separate.q_weight, separate.k_weight, separate.v_weight], axis=1)
    return weight, np.concatenate([separate.q_bias, separate.k_bias, separate.v_bias])


def separate_attention(
    x: Array, separate: SeparateProjections, c_proj_weight: Array, c_proj_bias: Array, n_head: int
) -> Array:
    """(T, C) to (T, C): causal attention as textbooks write it, one head after another.

    head_h = softmax(mask(Q_h K_h^T / sqrt(D))) V_h, out = [head_1, ..., head_H] W_proj + b. Vaswani et al. 2017, section
    3.2.2. Each of the three projections is (C, C) and serves all heads: head h uses its own D = C / H columns.
    """
    T, C = x.shape
    D = C // n_head
    q = x @ separate.q_weight + separate.q_bias  # (T, C)
    k = x @ separate.k_weight + separate.k_bias
    v = x @ separate.v_weight + separate.v_bias
    is_later = np.arange(T)[None, :] > np.arange(T)[:, None]  # (T, T): row t may not see column s if s > t
    heads = []
    for head in range(n_head):
        own = slice(head * D, (head + 1) * D)
        scores = np.where(is_later, -np.inf, q[:, own] @ k[:, own].T / math.sqrt(D))  # (T, T)
        weights = np.exp(scores - scores.max(1, keepdims=True))  # softmax over each row; exp(-inf) = 0
        weights /= weights.sum(1, keepdims=True)
        heads.append(weights @ v[:, own])  # (T, D)
    return np.concatenate(heads, axis=1) @ c_proj_weight + c_proj_bias


def sinusoidal_positions(n_positions: int, n_embd: int) -> Array:
    """(n_positions, n_embd) float64. InputError if `n_embd` is odd.

    Channel 2i is sin(position / 10000^(2i / n_embd)), channel 2i + 1 is the cosine of the same angle. Each pair of channels
    is a point on a circle that rotates with the position: the first pair makes one turn in 2 pi tokens, the last pair nearly
    one turn in 2 pi 10000 tokens. Moving on by n tokens rotates each pair by an angle that depends on n alone.
    Vaswani et al. 2017, section 3.5.
    """
    if n_embd % 2:
        raise InputError(f"n_embd={n_embd} is odd: sines and cosines come in pairs, so choose an even number")
    frequencies = 10000.0 ** (-np.arange(0, n_embd, 2) / n_embd)
    angles = np.arange(n_positions)[:, None] * frequencies  # (n_positions, n_embd / 2)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(n_positions, n_embd)
