"""The matrices of a model's linear layers, also of quantized layers and of layers with an adapter.

It depends on `Conv1D`; of other layers it knows only that they are linear.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt2.model import Conv1D


def matrix_of(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return W (n_in, n_out) and the bias (n_out,) of a layer y = x W + b; `like` (..., n_in) is an input of it.

    W and the bias of a layer that is not a plain `Conv1D` are its outputs for unit vectors and zeros.
    """
    if type(layer) is Conv1D:
        return layer.weight, layer.bias
    zeros = torch.zeros(1, like.shape[-1], dtype=like.dtype, device=like.device)
    bias = layer.forward(zeros)[0]
    ones = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    return layer.forward(ones) - bias, bias
