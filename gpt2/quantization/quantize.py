"""int8 quantization of a model: its layers are replaced by layers with one byte per weight. It depends on the model.

Each output channel of a layer has its own scale: its largest absolute weight divided by 127. The weights are rounded to
integer multiples of the scale. Biases, norms and position embeddings stay in float32, and so does the arithmetic between the
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gpt2.model import GPT2, Conv1D, TokenEmbedding
from gpt2.quantization.kernels import ENGINES, quantized_rows
from gpt2.quantization.layers import Int8Embedding, Int8Linear
from gpt_config.errors import CheckpointError, InputError


def quantize_int8(model: GPT2, *, engines: Sequence[str] = ENGINES) -> GPT2:
    """Replace the layers of `model` by int8 layers, in place, and return the model. It can then no longer be trained.

    The weights, all of which are read for each token, take a quarter of the bytes of float32. On a CPU, the products use the
    first of `engines` that torch has. Raises CheckpointError if a weight is NaN or infinite, and InputError if a layer is
    not a `Conv1D`.
    """
    check_finite(dict(model.named_parameters()))
    return _swap_layers(model.float(), quantized_rows, engines)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a tensor contains NaN or infinity, which the int8 kernels turn into ordinary numbers."""
    for name, tensor in tensors.items():
        # If a value is NaN, both results of `aminmax` are NaN.
        if tensor.is_floating_point() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):
            raise CheckpointError(f"{name} contains NaN or infinity: the weights are damaged; use another copy of the files")


def empty_int8(model: GPT2) -> GPT2:
    """Replace the layers of `model`, which is on the device "meta", by int8 layers without contents, and return it."""
    # `new_empty`, because `empty_like` on "meta" imports a part of torch's compiler (0.2 s).
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
                raise InputError(f"a layer {type(layer).__name__} cannot be quantized: merge adapters into the model first")
            setattr(parent, name, Int8Linear(*quantized(layer.weight.detach().t()), layer.bias.detach(), engines=engines))
    model.wte = Int8Embedding(*quantized(model.wte.weight.detach()), None, engines=engines)  # type: ignore[assignment]
    return model


def dequantize(model: GPT2) -> GPT2:
    """Replace the int8 layers of `model` by layers in float32, in place, and return the model. It can be trained again.

    The weights are `weight_int8 * scale`: those of int8, not those before quantization. Raises InputError if the model is
    not in int8.
    """
    if not is_int8(model):
        raise InputError("the model is not in int8: use it as it is")
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _float_layer(module))
    return model.requires_grad_(True)


def _float_layer(module: Int8Linear) -> nn.Module:
    weight = module.weight_int8 * module.scale[:, None]  # (n_out, n_in)
    with torch.device("meta"):  # the initial values would be replaced
        layer: nn.Module = (
            TokenEmbedding(*weight.shape) if isinstance(module, Int8Embedding) else Conv1D(*weight.shape[::-1])
        )
    weights = {"weight": weight if module.bias is None else weight.t().contiguous()}
    layer.load_state_dict(weights if module.bias is None else {**weights, "bias": module.bias}, assign=True)
    return layer


def is_int8(model: nn.Module) -> bool:
    """Return whether a layer of the model is in int8."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def check_can_learn(model: nn.Module) -> None:
    """Raise InputError if the model is in int8, because rounded weights have no gradient."""
    if is_int8(model):
        raise InputError("the model is in int8, which cannot be trained: start from the weights before quantization")
