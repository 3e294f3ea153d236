"""Reads a model from its config and tensors: it builds the model without memory and assigns the tensors.

It depends on the model and on `gpt2.quantization`, not on file formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt2.model import GPT2
from gpt2.quantization.quantize import check_finite, empty_int8
from gpt2.weights.folder import refuse_special_files
from gpt2.weights.names import n_layers
from gpt_config.errors import CheckpointError
from gpt_config.model_config import CONFIG_FILES, GPT2Config

# The largest number of names in a message, which must stay one line.
_MAX_NAMED = 20

Model = TypeVar("Model", bound=GPT2)


def assemble(
    model_type: type[Model],
    config: GPT2Config,
    tensors: dict[str, Tensor],
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Model:
    """Return the model of `config`, in eval mode, with `tensors` as its parameters, on `device` and in `dtype`.

    Raises CheckpointError, which names `folder`, if the tensors do not fit the config.
    """
    # Before the model is built: layers without weights need no memory, but a million of them need hours.
    if config.n_layer > 2 * n_layers(tensors) + _MAX_NAMED:
        raise CheckpointError(
            f"the weights in {folder} do not fit its config: n_layer={config.n_layer}, but the weights have "
            f"{n_layers(tensors)} layers: use weights and config of the same model"
        )
    holds_int8 = "wte.weight_int8" in tensors
    with torch.device("meta"), _NoInitialWeights():
        model = model_type(config)
        if holds_int8:
            empty_int8(model)
    if wrong := misfits(tensors, {name: tensor.shape for name, tensor in model.state_dict().items()}):
        raise CheckpointError(
            f"the weights in {folder} do not fit its config: {wrong}: use weights and config of the same model"
        )
    if holds_int8 and dtype != torch.float32:
        raise CheckpointError(f"{folder} contains int8 weights, which need dtype float32: leave out dtype {dtype}")
    if holds_int8:
        check_finite(tensors)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


class _NoInitialWeights(TorchFunctionMode):
    """Skips the functions of `torch.nn.init`, because the initial weights would be replaced.

    On the device "meta", torch would import its compiler for them, which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def read_config(folder: Path) -> GPT2Config:
    """Return the config of a model folder, from `config.json` or OpenAI's `hparams.json`. Raises CheckpointError."""
    refuse_special_files(folder, CONFIG_FILES)
    if any((folder / name).is_file() for name in CONFIG_FILES):
        return GPT2Config.from_folder(folder)
    raise CheckpointError(f"{folder} has no config.json: name a folder that contains config.json and the weights")


def misfits(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], limit: int = _MAX_NAMED) -> str:
    """Return a description of the tensors that do not have the names, `shapes` and kinds of dtype of the model.

    It names missing tensors, unknown ones, wrong shapes and wrong dtypes, at most `limit` of each. It is "" if all fit.
    """
    wrong = []
    if missing := shapes.keys() - tensors.keys():
        wrong.append(f"missing {_listed(missing, limit)}")
    if extra := tensors.keys() - shapes.keys():
        wrong.append(f"unknown {_listed(extra, limit)}")
    for name in sorted(shapes.keys() & tensors.keys()):
        tensor = tensors[name]
        if tensor.shape != shapes[name]:
            wrong.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(shapes[name])}")
        elif name.endswith("weight_int8"):
            if tensor.dtype != torch.int8:
                wrong.append(f"{name} is {tensor.dtype} instead of int8")
        elif not tensor.is_floating_point():
            wrong.append(f"{name} is {tensor.dtype} instead of a floating-point type")
    more = f"; and {len(wrong) - limit} more" if len(wrong) > limit else ""
    return "; ".join(wrong[:limit]) + more


def _listed(names: set[str], limit: int) -> str:
    first = sorted(names)[:limit]
    return ", ".join(f"{name:.80}" for name in first) + (
        f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    )
