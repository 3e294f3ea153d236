"""What several formats share: transposed matrices, and the architectures that a program without settings can compute."""

from __future__ import annotations

from torch import Tensor

from gpt_config.errors import InputError
from gpt_config.model_config import GPT2Config

# The names of GPT-2's activation function, a tanh approximation.
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def is_transposed(name: str, tensor: Tensor) -> bool:
    """Return whether a parameter is a matrix of a block, which torch's Linear and others store as (outputs, inputs)."""
    return name.startswith("h.") and name.endswith(".weight") and tensor.dim() == 2


def transposed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` with the matrices of the blocks transposed: (inputs, outputs) to (outputs, inputs), or back."""
    return {name: tensor.t() if is_transposed(name, tensor) else tensor for name, tensor in tensors.items()}


def check_computes(config: GPT2Config, title: str, *, activations: tuple[str, ...] = TANH_GELU) -> None:
    """Raise InputError if a program that computes OpenAI's GPT-2 and has no settings would compute another model."""
    required = {
        "n_inner": (config.inner_dim, 4 * config.n_embd),
        "layer_norm_epsilon": (config.layer_norm_epsilon, 1e-5),
        "scale_attn_weights": (config.scale_attn_weights, True),
        "scale_attn_by_inverse_layer_idx": (config.scale_attn_by_inverse_layer_idx, False),
    }
    for name, (value, needed) in required.items():
        if value != needed:
            raise InputError(f"{title} cannot say {name}={value}, only {needed}: choose another format")
    if config.activation_function not in activations:
        raise InputError(
            f"{title} cannot say activation_function={config.activation_function!r}, only {activations[0]!r}: "
            "choose another format"
        )


def check_dtype(dtype: str, dtypes: tuple[str, ...], title: str) -> None:
    """Raise InputError if a format cannot be written in `dtype`."""
    if dtype not in dtypes:
        raise InputError(f"dtype={dtype!r} cannot be written as {title}: use {' or '.join(dtypes)}")
