"""int8 quantization: one byte per weight, by replacing the layers of a model.

Each output channel of a layer has its own scale, the largest of its weights in absolute value over 127, and its weights are
rounded to whole multiples of it. The rest, biases, norms and positions, stays in float32, and so does the arithmetic between
the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gpt2.model import GPT2, Conv1D
from gpt2.quantization.kernels import ENGINES, quantized_rows
from gpt2.quantization.layers import Int8Embedding, Int8Linear
from gpt_config.errors import CheckpointError, InputError


def quantize_int8(model: GPT2, *, engines: Sequence[str] = ENGINES) -> GPT2:
    """Swap the layers of `model` for such of int8, in place, and return it. It can then no longer be trained.

    A quarter of the bytes, to be read for every token. On a CPU the first of `engines` that torch has multiplies them.
    CheckpointError if a weight is NaN or infinite.
    """
    check_finite(dict(model.named_parameters()))
    return _swap_layers(model.float(), quantized_rows, engines)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError if a tensor holds NaN or infinity, from which the kernels for bytes make ordinary numbers."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):  # NaN makes both NaN
            raise CheckpointError(f"{name} holds NaN or infinity, which int8 cannot compute with: the weights are damaged")


def empty_int8(model: GPT2) -> GPT2:
    """`model`, which has no content (it is on "meta"), with layers of int8, for the content of a file to be put into."""
    # `new_empty` and not `empty_like`, which on "meta" imports a part of torch's compiler (0.2 s).
    return _swap_layers(
        model, lambda weight: (weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight)))
    )


def _swap_layers(
    model: GPT2, quantized: Callable[[Tensor], tuple[Tensor, Tensor]], engines: Sequence[str] = ENGINES
) -> GPT2:
    model.requires_grad_(False)
    for block in model.h:
        for parent, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            layer = getattr(parent, name)
            if type(layer) is not Conv1D:
                raise InputError(f"a layer {type(layer).__name__} has no int8: merge adapters into the model first")
            setattr(parent, name, Int8Linear(*quantized(layer.weight.detach().t()), layer.bias.detach(), engines=engines))
    model.wte = Int8Embedding(*quantized(model.wte.weight.detach()), None, engines=engines)  # type: ignore[assignment]
    return model


def is_int8(model: nn.Module) -> bool:
    """True if a layer is in int8."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def check_can_learn(model: nn.Module) -> None:
    """InputError if the model is in int8: rounded weights have no gradient."""
    if is_int8(model):
        raise InputError("the model is in int8, which cannot be trained: start from the weights it was made of")
