"""nanoGPT's `ckpt.pt`, in and out: a pickle of torch with the dictionaries `model` and `model_args`.

Its model differs from OpenAI's in two ways: GELU is the exact one, and `bias=False` leaves out all biases. Nothing but
tensors and plain containers is unpickled.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2.formats.layout import TANH_GELU, check_computes, transposed
from gpt2.formats.registry import Imported, config_of
from gpt2.weights.files import check_tensors, unpickle
from gpt2.weights.names import published_names
from gpt_config.errors import CheckpointError, GPT2Warning, InputError
from gpt_config.model_config import GPT2Config

if TYPE_CHECKING:
    from gpt2.model import GPT2
    from gpt_encoder.interface import Tokenizer

TITLE = "a nanoGPT checkpoint"
DTYPES = ("float32", "float16", "bfloat16")
IS_FOLDER = False

_FIELDS = {"block_size": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd"}


def read(path: Path) -> Imported:
    """Read a checkpoint, or the `ckpt.pt` of a folder, also of a compiled model or one in DistributedDataParallel."""
    path = path / "ckpt.pt" if path.is_dir() else path
    content = unpickle(path)
    arguments, state = (content.get(key) for key in ("model_args", "model")) if isinstance(content, dict) else (None, None)
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path} is not {TITLE}: it needs the dictionaries model and model_args")
    arguments = {key: value for key, value in arguments.items() if isinstance(value, (bool, int, float))}
    check_tensors(state, path)
    tensors = published_names(state, path)
    config = _config(path, arguments, tensors)
    if arguments.get("bias") is False:
        tensors |= _no_biases(tensors)
    return Imported(config, transposed(tensors))


def _config(path: Path, arguments: dict[Any, Any], tensors: dict[str, Tensor]) -> GPT2Config:
    if lacking := [name for name in _FIELDS if name not in arguments]:
        raise CheckpointError(f"{path} is not {TITLE}: its model_args lack {lacking[0]!r}")
    fields = {field: arguments[name] for name, field in _FIELDS.items()}
    rate = arguments.get("dropout", 0.0)
    rows = tensors["wte.weight"].shape[0] if "wte.weight" in tensors and tensors["wte.weight"].dim() == 2 else 0
    return config_of(
        path, TITLE, **fields, vocab_size=arguments.get("vocab_size") or rows, activation_function="gelu",
        embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate,
    )  # fmt: skip


def _no_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a bias of zeros for each weight of a norm or a matrix without one."""
    biases = {}
    for name, tensor in tensors.items():
        bias = name.removesuffix("weight") + "bias"
        if name.startswith(("h.", "ln_f.")) and name.endswith(".weight") and bias not in tensors and tensor.dim() > 0:
            biases[bias] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    return biases


def write(model: GPT2, tokenizer: Tokenizer | None, path: Path, dtype: str) -> None:
    """Write a checkpoint that nanoGPT's sample.py and train.py read with `--init_from=resume`.

    A GPT2Warning is issued for OpenAI's GELU, because nanoGPT computes the exact one. The format has no tokenizer.
    """
    config = model.config
    check_computes(config, TITLE, activations=("gelu", *TANH_GELU))
    if config.activation_function != "gelu":
        warnings.warn(
            f"nanoGPT computes the exact GELU, and this model {config.activation_function!r}: its logits will differ by "
            "about 0.001, until it is trained again",
            GPT2Warning,
            2,
        )
    if len({config.embd_pdrop, config.attn_pdrop, config.resid_pdrop}) > 1:
        raise InputError("nanoGPT has one rate of dropout, and this model several: set them to the same rate")
    stored = {
        f"transformer.{name}": tensor.detach().to(getattr(torch, dtype)).contiguous()
        for name, tensor in transposed(model.state_dict()).items()
    }
    stored["lm_head.weight"] = stored["transformer.wte.weight"]  # the same storage: it is written once
    arguments = {name: getattr(config, field) for name, field in _FIELDS.items()}
    content = {
        "model": stored,
        "optimizer": _new_optimizer(model),
        "model_args": {**arguments, "vocab_size": config.vocab_size, "dropout": config.resid_pdrop, "bias": True},
        "iter_num": 0,
        "best_val_loss": 1e9,  # as nanoGPT has it before the first evaluation
        "config": {},
    }
    torch.save(content, path)


def _new_optimizer(model: GPT2) -> dict[str, Any]:
    """Return the state of nanoGPT's optimizer before its first step, which train.py needs to go on from a checkpoint."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()
