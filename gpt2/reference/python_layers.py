"""Rows, matrices and the functions of GPT-2's layers in Python's standard library alone: `python_gpt2` begins here.

The letters for shapes and the papers in brackets are those of `python_gpt2`. It knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import mul

# A row is a list, or an `array` if it holds weights: a number takes 4 bytes in an array and 32 bytes in a list.
Row = Sequence[float]
# (n, m) is n rows of m numbers.
Matrix = Sequence[Row]

# ---------------------------------------------------------------------------------------------------------------------
# Rows and matrices
# ---------------------------------------------------------------------------------------------------------------------


def _sum_of_products(a: Row, b: Row) -> float:
    total: float = sum(map(mul, a, b))
    return total


# The dot product of two rows of equal length: sum_i a_i b_i. Nearly all of the time is spent here, so it avoids a loop in
# Python, in which each step would cost more than the multiplication. Python 3.12 has it as math.sumprod.
dot: Callable[[Row, Row], float] = getattr(math, "sumprod", _sum_of_products)


def transpose(a: Matrix) -> list[list[float]]:
    """(n, m) to (m, n): out[j][i] = a[i][j]."""
    return [list(column) for column in zip(*a, strict=True)]


def matmul(a: Matrix, b: Matrix) -> list[list[float]]:
    """(n, k) times (k, m) to (n, m): out[i][j] = sum_l a[i][l] b[l][j], the dot product of row i and column j."""
    columns = transpose(b)
    return [[dot(row, column) for column in columns] for row in a]


def add(a: Matrix, b: Matrix) -> list[list[float]]:
    """(n, m) plus (n, m) to (n, m): out[i][j] = a[i][j] + b[i][j].

    It makes residual connections: the result of a layer is added to the layer's input. [transformer] section 3.1.
    """
    return [[x + y for x, y in zip(row_a, row_b, strict=True)] for row_a, row_b in zip(a, b, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The functions of a layer
# ---------------------------------------------------------------------------------------------------------------------


def softmax(x: Row) -> list[float]:
    """(n,) to (n,): out_i = exp(x_i) / sum_j exp(x_j). The results are not negative and sum to 1: probabilities.

    The largest x is subtracted from every x first, so that no exponential overflows. The result is the same, because both
    the numerator and the denominator are divided by exp(largest). [transformer] section 3.2.1; [openai] `softmax`.
    """
    largest = max(x)
    exponentials = [math.exp(value - largest) for value in x]
    total = sum(exponentials)
    return [value / total for value in exponentials]


def masked_softmax(scores: Row, n_visible: int) -> list[float]:
    """(S,) to (S,): the softmax of the first `n_visible` scores, then 0 for the others, which belong to later tokens.

    The papers replace the hidden scores by minus infinity before the softmax. That gives the same numbers, because
    exp(-infinity) = 0. [transformer] section 3.2.3; [openai] `mask_attn_weights`.
    """
    return softmax(scores[:n_visible]) + [0.0] * (len(scores) - n_visible)


def layer_norm(x: Row, weight: Row, bias: Row, epsilon: float) -> list[float]:
    """(C,) to (C,): out_i = (x_i - mean) / sqrt(variance + epsilon) * weight_i + bias_i, over the channels of one token.

    The variance is the mean of the squared deviations from the mean (divided by C, not by C - 1). `weight` and `bias` are
    learned, `epsilon` prevents division by zero. [layer norm] section 3; [openai] `norm`.
    """
    mean = sum(x) / len(x)
    centred = [value - mean for value in x]
    scale = 1 / math.sqrt(dot(centred, centred) / len(x) + epsilon)
    return [value * scale * w + b for value, w, b in zip(centred, weight, bias, strict=True)]


def gelu(x: float) -> float:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): close to x for large x, close to 0 for very negative x.

    It approximates x times the probability that a standard normal number is below x, which is `exact_gelu`.
    [gelu] section 2; [openai] `gelu`.
    """
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x: float) -> float:
    """x Phi(x) = 0.5 x (1 + erf(x / sqrt(2))), where Phi is the distribution function of the standard normal distribution.

    [gelu] section 2; no published GPT-2 uses it.
    """
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def relu(x: float) -> float:
    """max(x, 0). [transformer] section 3.3; no published GPT-2 uses it."""
    return max(x, 0.0)


# Keys are the names in config.json. The first three names mean the same function.
ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "gelu_new": gelu,
    "gelu_pytorch_tanh": gelu,
    "gelu_fast": gelu,
    "gelu": exact_gelu,
    "relu": relu,
}


def embedding(table: Matrix, ids: Sequence[int]) -> list[Row]:
    """(T,) ids to (T, C): the row of `table` (V, C) for each id. [transformer] section 3.4; [openai] `model`, tf.gather."""
    return [table[token] for token in ids]


def linear(x: Matrix, columns: Matrix, bias: Row) -> list[list[float]]:
    """(T, n_in) to (T, n_out): out = x W + bias, for each token separately.

    W (n_in, n_out) is given as its `columns` (n_out, n_in), because each number of the output is the dot product of a row of
    x and a column of W. [transformer] section 3.3; [openai] `conv1d`.
    """
    if len(x) == 1:
        return [[dot(x[0], column) + b for column, b in zip(columns, bias, strict=True)]]
    out = []
    for column, b in zip(columns, bias, strict=True):
        weights = list(column)  # reading an array creates a float object each time; a list keeps its objects
        out.append([dot(row, weights) + b for row in x])
    return transpose(out)
