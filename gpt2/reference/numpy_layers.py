"""The layers of GPT-2 in NumPy, each as a pair of functions: `x_forward`, and `x_backward` with a gradient derived by hand.

A forward function returns its result and what its backward function needs. A backward function takes dL/d(result), called
`d_out`, where L is the loss, and returns dL/d(input) for each input. No argument is changed. Arithmetic stays in the dtype
of the inputs, float32 or float64. The layers know arrays only: no configs and no names of parameters.

B is the batch size, T the number of tokens in this call, S the number of cached tokens plus T, C the number of channels,
H the number of heads, D = C / H, V the size of the vocabulary. (..., C) means any number of axes before the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
# What a forward function keeps for its backward function. No other code looks inside.
Saved = tuple[Any, ...]
# Is called with the name and value of each intermediate result. Names are those of TransformerLens.
Keep = Callable[[str, Array], object]


def ignore(name: str, value: Array) -> None:
    """Keep nothing."""


def embedding_forward(table: Array, ids: Array) -> tuple[Array, Saved]:
    """(...,) ids to (..., C): the row of `table` (V, C) for each id."""
    return table[ids], (table.shape, ids)


def embedding_backward(d_out: Array, saved: Saved) -> Array:
    """dL/dtable (V, C): each row is the sum of `d_out` over all places where its id occurs."""
    shape, ids = saved
    d_table = np.zeros(shape, d_out.dtype)
    # `d_table[ids] += d_out` would add only once for an id that occurs twice. After sorting, equal ids are adjacent, and
    # `reduceat` sums each run of equal ids.
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    present, starts = np.unique(flat[order], return_index=True)
    if flat.size:
        d_table[present] = np.add.reduceat(d_out.reshape(-1, shape[1])[order], starts, axis=0)
    return d_table


def layer_norm_forward(x: Array, weight: Array, bias: Array, epsilon: float, keep: Keep = ignore) -> tuple[Array, Saved]:
    """(..., C) to (..., C): n * weight + bias with n = (x - mean) / sqrt(variance + epsilon), for each token separately.

    Mean and variance are over the C channels of the token; the variance is divided by C, not by C - 1.

    Ba et al. 2016, "Layer Normalization", section 3.
    """
    normed = x - x.mean(-1, keepdims=True)
    inverse_std = 1 / np.sqrt(_dot(normed, normed) / x.shape[-1] + epsilon)
    normed *= inverse_std
    keep("hook_scale", 1 / inverse_std)
    keep("hook_normalized", normed)
    out = normed * weight
    out += bias
    return out, (normed, inverse_std, weight)


def layer_norm_backward(d_out: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """dL/dx (..., C), dL/dweight (C,), dL/dbias (C,).

    out = n * weight + bias, so dL/dweight is the sum of d_out * n over all tokens, and dL/dbias the sum of d_out. The
    gradient of n is g = d_out * weight. A change of x_i changes n_i directly, and it changes all of n through the mean and
    the variance. The path through the mean subtracts mean(g); the path through the variance subtracts n mean(g n):
    dL/dx = (g - mean(g) - n mean(g n)) / std, where std = sqrt(variance + epsilon).
    """
    normed, inverse_std, weight = saved
    C = normed.shape[-1]
    flat = d_out.reshape(-1, C)
    d_weight = np.einsum("nc,nc->c", flat, normed.reshape(-1, C))
    d_bias = flat.sum(0)
    d_x = d_out * weight
    along = _dot(d_x, normed) / C
    d_x -= d_x.mean(-1, keepdims=True)
    d_x -= normed * along
    d_x *= inverse_std
    return d_x, d_weight, d_bias


def _dot(a: Array, b: Array) -> Array:
    """(..., C) and (..., C) to (..., 1): the sum of a * b over the last axis, without a temporary array of the size of a."""
    products: Array = np.einsum("...c,...c->...", a, b)
    return products[..., None]


def linear_forward(x: Array, weight: Array, bias: Array) -> tuple[Array, Saved]:
    """(..., n_in) to (..., n_out): x W + bias, with W (n_in, n_out) as in the published files."""
    flat = x.reshape(-1, x.shape[-1])  # (N, n_in): all tokens of the batch in one matrix, for one large product
    out = flat @ weight
    out += bias
    return out.reshape(*x.shape[:-1], -1), (flat, weight)


def linear_backward(d_out: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """dL/dx = d_out W^T, dL/dW = x^T d_out, dL/dbias = the sum of d_out over all tokens.

    out_j = sum_i x_i W_ij + b_j for each token. So d out_j / d x_i = W_ij and d out_j / d W_ij = x_i. The sums over j, and
    over all tokens, are matrix products.
    """
    flat, weight = saved
    d_flat = d_out.reshape(-1, d_out.shape[-1])  # (N, n_out)
    d_x = (d_flat @ weight.T).reshape(*d_out.shape[:-1], -1)
    return d_x, flat.T @ d_flat, d_flat.sum(0)


# How many numbers are processed at a time: a few arrays of this length fit into a core's second-level cache.
_PART = 1 << 15

# The tanh approximation of the GELU is 0.5 x (1 + tanh(u)) with u = _A x + _B x^3.
# _A and _B are the coefficients of x and x^3 in u.
_A = math.sqrt(2 / math.pi)
_B = _A * 0.044715


def gelu_forward(x: Array) -> tuple[Array, Saved]:
    """0.5 x (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3). Hendrycks and Gimpel 2016, section 2."""
    tanh, out = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
    for x_part, t, y in _in_parts(x, tanh, out):
        np.multiply(x_part, x_part, out=t)
        t *= _B
        t += _A
        t *= x_part
        np.tanh(t, out=t)
        np.add(t, 1, out=y)
        y *= x_part
        y *= 0.5
    return out, (x, tanh)


def gelu_backward(d_out: Array, saved: Saved) -> Array:
    """dL/dx = d_out (0.5 (1 + tanh u) + 0.5 x (1 - tanh^2 u) u') with u' = _A + 3 _B x^2, by the product and chain rules.

    Computed as d_out 0.5 (1 + tanh u) (1 + x (1 - tanh u) u'), because 1 - t^2 = (1 + t)(1 - t).
    """
    x, tanh = saved
    d_x = np.empty(x.shape, x.dtype)
    for x_part, t, d_out_part, d in _in_parts(x, tanh, d_out, d_x):
        np.multiply(x_part, x_part, out=d)
        d *= 3 * _B
        d += _A  # u'
        d *= x_part
        d *= 1 - t
        d += 1
        d *= t + 1
        d *= d_out_part
        d *= 0.5
    return d_x


def _in_parts(*arrays: Array) -> Iterator[list[Array]]:
    """Yield the same part of each array, one part after another: several operations on a part are faster in the cache."""
    flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
    for first in range(0, flat[0].size, _PART):
        yield [array[first : first + _PART] for array in flat]


def exact_gelu_forward(x: Array) -> tuple[Array, Saved]:
    """x Phi(x), where Phi(x) = 0.5 (1 + erf(x / sqrt 2)). Slow: NumPy has no erf, so math.erf is called for each number."""
    erf = np.vectorize(math.erf, otypes=[x.dtype])(x / math.sqrt(2))
    phi = 0.5 * (1 + erf)
    return x * phi, (x, phi)


def exact_gelu_backward(d_out: Array, saved: Saved) -> Array:
    """dL/dx = d_out (Phi(x) + x phi(x)), where the density phi(x) = exp(-x^2 / 2) / sqrt(2 pi) is the derivative of Phi."""
    x, phi = saved
    d_x: Array = d_out * (phi + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))
    return d_x


def relu_forward(x: Array) -> tuple[Array, Saved]:
    """max(x, 0)."""
    return np.maximum(x, 0), (x,)


def relu_backward(d_out: Array, saved: Saved) -> Array:
    """dL/dx is d_out where x is positive, and 0 elsewhere."""
    d_x: Array = d_out * (saved[0] > 0)
    return d_x


# (forward, backward) by name in config.json. The first three names mean the same function.
ACTIVATIONS = {
    "gelu_new": (gelu_forward, gelu_backward),
    "gelu_pytorch_tanh": (gelu_forward, gelu_backward),
    "gelu_fast": (gelu_forward, gelu_backward),
    "gelu": (exact_gelu_forward, exact_gelu_backward),
    "relu": (relu_forward, relu_backward),
}


def dropout_forward(x: Array, p: float, rng: np.random.Generator | None) -> tuple[Array, Saved]:
    """Each number becomes 0 with probability p. Otherwise it is divided by 1 - p, so that its expected value is unchanged.

    Without a generator, or with p = 0, the result is x. The random numbers are float32 also for float64 inputs, so that one
    seed drops the same places in both types. Srivastava et al. 2014, section 10.
    """
    if rng is None or p == 0:
        return x, (None,)
    kept = rng.random(x.shape, dtype=np.float32) >= p
    mask = np.multiply(kept, 1 / (1 - p), dtype=x.dtype)
    return x * mask, (mask,)


def dropout_backward(d_out: Array, saved: Saved) -> Array:
    """dL/dx = d_out * mask, with the mask of the forward function: a dropped number has no influence on the result."""
    (mask,) = saved
    return d_out if mask is None else d_out * mask


def softmax_forward(x: Array) -> tuple[Array, Saved]:
    """(..., n) to (..., n): exp(x_i) / sum_j exp(x_j).

    The largest x is subtracted from all first, so that no exponential overflows; the factor cancels in the quotient.
    """
    y = x - x.max(-1, keepdims=True)
    np.exp(y, out=y)
    y /= y.sum(-1, keepdims=True)
    return y, (y,)


def softmax_backward(d_out: Array, saved: Saved) -> Array:
    """dL/dx_i = y_i (d_out_i - sum_j d_out_j y_j).

    dy_j/dx_i = y_j ([i = j] - y_i), where [i = j] is 1 if i = j, else 0: raising x_i lowers each other y_j in proportion to
    it, because the sum of all y stays 1.
    """
    (y,) = saved
    d_x = d_out - _dot(d_out, y)
    d_x *= y
    return d_x


def causal_attention_forward(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    p: float = 0.0,
    rng: np.random.Generator | None = None,
    keep: Keep = ignore,
) -> tuple[Array, Saved]:
    """q (..., T, D), k and v (..., S, D) to (..., T, D): dropout(softmax(q k^T * scale)) v, where no token sees a later one.

    The queries belong to the last T of the S tokens. Vaswani et al. 2017, section 3.2.1, equation 1.
    """
    T, S = q.shape[-2], k.shape[-2]
    q_scaled = q * scale  # the same as scaling the scores, which are usually more numbers
    scores = q_scaled @ k.swapaxes(-1, -2)  # (..., T, S)
    scores += np.triu(np.full((T, S), -np.inf, scores.dtype), k=S - T + 1)  # exp(-inf) = 0: later tokens get weight 0
    weights, softmax_saved = softmax_forward(scores)
    keep("hook_attn_scores", scores)
    keep("hook_pattern", weights)
    dropped, dropout_saved = dropout_forward(weights, p, rng)
    return dropped @ v, (q_scaled, k, v, scale, dropped, softmax_saved, dropout_saved)


def causal_attention_backward(d_out: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """dL/dq (..., T, D), dL/dk and dL/dv (..., S, D): the chain rule through both products, the dropout and the softmax.

    Hidden scores need no mask here: their weights are 0, and softmax_backward multiplies by the weights.
    """
    q_scaled, k, v, scale, dropped, softmax_saved, dropout_saved = saved
    d_v = dropped.swapaxes(-1, -2) @ d_out  # out = P v, so dL/dv = P^T d_out and dL/dP = d_out v^T
    d_dropped = d_out @ v.swapaxes(-1, -2)  # (..., T, S)
    d_scores = softmax_backward(dropout_backward(d_dropped, dropout_saved), softmax_saved)
    d_q = d_scores @ k  # scores = (q * scale) k^T, a product of the same kind
    d_q *= scale
    d_k = d_scores.swapaxes(-1, -2) @ q_scaled
    return d_q, d_k, d_v


def split_heads(x: Array, n_head: int) -> Array:
    """(B, T, C) to (B, H, T, D), as a view: head h has the channels from h D to (h + 1) D."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).transpose(0, 2, 1, 3)


def merge_heads(x: Array) -> Array:
    """(B, H, T, D) to (B, T, C): the inverse of `split_heads`. Each of the two is therefore the backward of the other."""
    B, H, T, D = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * D)


def tied_head_forward(x: Array, token_embedding: Array) -> tuple[Array, Saved]:
    """(B, T, C) to logits (B, T, V): x wte^T, with the token embedding wte (V, C). Press and Wolf 2017, section 3."""
    flat = x.reshape(-1, x.shape[-1])
    return (flat @ token_embedding.T).reshape(*x.shape[:-1], -1), (flat, token_embedding)


def tied_head_backward(d_out: Array, saved: Saved) -> tuple[Array, Array]:
    """dL/dx = d_out wte, and the head's part of dL/dwte: d_out^T x. `gpt2_backward` adds the input embedding's part."""
    flat, token_embedding = saved
    d_flat = d_out.reshape(-1, d_out.shape[-1])
    return (d_flat @ token_embedding).reshape(*d_out.shape[:-1], -1), d_flat.T @ flat


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[float, Saved]:
    """Logits (..., V) and target ids (...,) to the mean of -log softmax(logits)[target] over all targets, in nats.

    -log softmax_t = log sum_j exp(x_j) - x_t. The largest logit is subtracted from all first, as in `softmax_forward`.
    """
    shifted = (logits - logits.max(-1, keepdims=True)).reshape(-1, logits.shape[-1])
    rows, flat_targets = np.arange(targets.size), targets.reshape(-1)
    chosen = shifted[rows, flat_targets]
    probs = np.exp(shifted, out=shifted)
    total = probs.sum(-1, keepdims=True)
    loss = float((np.log(total[:, 0]) - chosen).mean())
    probs /= total
    return loss, (probs, flat_targets, logits.shape)


def cross_entropy_backward(saved: Saved, d_loss: float = 1.0) -> Array:
    """dL/dlogits (..., V) = d_loss (softmax(logits) - one-hot(target)) / number of targets.

    -log softmax_t = log sum_j exp(x_j) - x_t. The first term has the derivative softmax, the second has 1 at the target.
    """
    probs, targets, shape = saved
    d_logits: Array = probs * (d_loss / targets.size)
    d_logits[np.arange(targets.size), targets] -= d_loss / targets.size
    return d_logits.reshape(shape)
