"""Adapters in peft's format: adapter_config.json and adapter_model.safetensors. Depends on files, not on training.

peft names a tensor by its place in transformers' model. "h.0.attn.c_attn.lora_A" of this package is
"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" in the file. A classifier's head is "base_model.model.score".
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gpt2.adapters.lora import add_lora, lora_modules, named_lora_parameters, saved_parameters, target_configs
from gpt2.adapters.targets import matching
from gpt2.model import GPT2
from gpt2.weights.files import read_file
from gpt2.weights.folder import ADAPTER_CONFIG_FILE, adapter_file, is_model_folder
from gpt2.weights.for_others import describe_tokenizer
from gpt2.weights.reading import misfits
from gpt2.weights.resize import resize
from gpt2.weights.writing import write_tensors
from gpt_config.adapter_config import AdapterConfig
from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import CheckpointError, ConfigError, InputError, WriteError
from gpt_config.lora_config import LoRAConfig
from gpt_config.shipped import shipped_models
from gpt_config.unfinished import check_finished, unchanged
from gpt_config.whole_folder import whole_folder

if TYPE_CHECKING:
    from gpt_encoder.interface import Tokenizer

_IN_MODEL = "base_model.model.transformer."
_HEAD = "base_model.model.score."
# The names of an adapter on transformers' GPT2Model, instead of GPT2LMHeadModel, have no "transformer.".
_ADAPTER_KEY = re.compile(r"base_model\.model\.(?:transformer\.)?(h\..*\.lora_[AB])\.weight")
# Modules that are saved as a whole, and the head of a language model.
_SAVED_KEY = re.compile(r"base_model\.model\.(?:transformer\.)?((?:h\.\d+\.)?(?:wte|wpe|ln_f|ln_1|ln_2)\.(?:weight|bias))")
_LM_HEAD = "base_model.model.lm_head.weight"


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter folder: `tensors` by the names of `named_lora_parameters`, `head` as a state dict.

    `saved` are the parameters that replace the model's, by their names there. "lm_head.weight" is the head of a language
    model.
    """

    folder: Path
    config: AdapterConfig
    tensors: dict[str, Tensor]
    head: dict[str, Tensor]  # of a classifier: "weight" (classes, n_embd); otherwise empty
    saved: dict[str, Tensor] = field(default_factory=dict)


def save_adapter(
    model: GPT2,
    folder: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    head: nn.Module | None = None,
) -> None:
    """Write the adapters of `model` as a folder that peft and this package can load.

    All files are written, or none: see `save_model`. `base_model` is the name or folder of the model on which the adapters
    were trained. Pass a `tokenizer` to write its files too, if it is not the base model's. With `head`, a linear layer
    without bias, the adapter is that of a classifier.

    InputError if the model has no adapters. WriteError if the folder contains a model or cannot be written.
    """
    folder = Path(folder)
    configs = {module.config for _, module in lora_modules(model)}
    if len(configs) != 1:
        raise InputError(f"the model has adapters of {len(configs)} kinds, not of 1: add them with one call of add_lora")
    if is_model_folder(folder):
        raise WriteError(f"{folder} contains a model: write the adapter into another folder")
    tensors: dict[str, Tensor] = {f"{_IN_MODEL}{name}.weight": parameter for name, parameter in named_lora_parameters(model)}
    lora = configs.pop()
    tensors |= {f"{_IN_MODEL}{name}": model.get_parameter(name) for name in saved_parameters(model, lora)}
    if head is None and lora.saves("transformer.wte"):
        # Without a head of its own, peft would compute with the new embedding at the input and the old one at the head.
        tensors[_LM_HEAD] = model.wte.weight.clone()
    if head is not None:
        tensors |= {f"{_HEAD}{name}": parameter for name, parameter in head.named_parameters()}
    task_type = "CAUSAL_LM" if head is None else "SEQ_CLS"
    config = AdapterConfig(lora=lora, base_model=_stored_name(base_model), task_type=task_type)
    with whole_folder(folder) as new:
        write_tensors(new / "adapter_model.safetensors", tensors)
        atomic_write_json(new / ADAPTER_CONFIG_FILE, config.to_dict())
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
            describe_tokenizer(new, model.config)


def _stored_name(base_model: str | os.PathLike[str]) -> str:
    # A hub name is stored unchanged. A path is made absolute, so that it is valid in every working folder. The name of a
    # shipped model becomes its path, because peft does not know the name.
    folder = Path(base_model) if is_model_folder(Path(base_model)) else shipped_models().get(str(base_model))
    return str(base_model) if folder is None else str(folder.resolve())


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Return the content of an adapter folder. CheckpointError names what is missing, damaged or not supported."""
    folder = Path(folder)
    check_finished(folder)
    with unchanged(folder):
        config = AdapterConfig.from_json_file(folder / ADAPTER_CONFIG_FILE)
        path = adapter_file(folder)
        content = read_file(path)
    tensors: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in content.items():
        if (found := _ADAPTER_KEY.fullmatch(key)) and found[1] not in tensors:
            tensors[found[1]] = tensor
        elif key.startswith(_HEAD) and config.task_type == "SEQ_CLS":
            head[key.removeprefix(_HEAD)] = tensor
        elif (found := _SAVED_KEY.fullmatch(key)) and found[1] not in saved:
            saved[found[1]] = tensor
        elif key == _LM_HEAD and config.task_type == "CAUSAL_LM":
            saved["lm_head.weight"] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(
            f"{path} contains {min(unknown)!r}, which is not a LoRA matrix of GPT-2, or a second one for its layer"
        )
    return Adapter(folder, config, tensors, head, saved)


def load_adapter(model: GPT2, adapter: Adapter | str | os.PathLike[str], *, head: nn.Module | None = None) -> None:
    """Add the adapters of a folder to `model`, in place. After that, only the adapters require gradients.

    The adapter of a classifier also needs its `head`, whose weights are loaded. CheckpointError if the adapters do not fit;
    the model is then unchanged.
    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    _check_task(adapter, head)
    lora = _without_idle_targets(adapter.config.lora, model)
    try:
        own = target_configs(model, lora)
    except ConfigError as error:
        raise CheckpointError(f"the adapter in {adapter.folder} does not fit this model: {error}") from None
    _check_fit(adapter, adapter.tensors, _shapes(model, own))
    saved = _checked_saved(adapter, lora, model)
    if head is not None:
        _check_fit(adapter, adapter.head, {name: parameter.shape for name, parameter in head.named_parameters()})
    if "wte.weight" in saved and len(saved["wte.weight"]) > model.config.vocab_size:
        resize(model, len(saved["wte.weight"]))  # for tokens that were added before the adapter was trained
    add_lora(model, lora)
    parameters = dict(named_lora_parameters(model))
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            parameters[name].copy_(tensor)
        for name, tensor in saved.items():
            model.get_parameter(name).copy_(tensor)
    if head is not None:
        head.load_state_dict(adapter.head)


def _checked_saved(adapter: Adapter, lora: LoRAConfig, model: GPT2) -> dict[str, Tensor]:
    """Return the parameters that replace those of `model`. CheckpointError if they do not fit, or untie the head.

    peft replaces only the input embedding by a `wte` of modules_to_save. The head of a language model stays the old
    embedding, unless the adapter has an `lm_head` too. A `wte` that is saved without that, as with save_embedding_layers,
    replaces both.
    """
    saved = dict(adapter.saved)
    head, base = saved.pop("lm_head.weight", None), model.wte.weight
    names = dict.fromkeys([*saved_parameters(model, lora), *({"wte.weight"} & saved.keys())])
    shapes = {name: model.get_parameter(name).shape for name in names}
    if "wte.weight" in shapes and "wte.weight" in saved and saved["wte.weight"].dim() == 2:
        n_rows, width = shapes["wte.weight"]
        shapes["wte.weight"] = torch.Size((max(n_rows, len(saved["wte.weight"])), width))
    _check_fit(adapter, saved, shapes)
    if adapter.config.task_type == "CAUSAL_LM" and (head is not None or "wte.weight" in saved):
        wte = saved.get("wte.weight", base)
        head = head if head is not None else base if lora.saves("transformer.wte") else wte
        if wte.shape != head.shape or not torch.equal(wte.to(head), head):
            raise CheckpointError(
                f"the adapter in {adapter.folder} makes wte and lm_head differ: this package supports only GPT-2's head, "
                "which is the token embedding; train with modules_to_save=['lm_head'] and ensure_weight_tying=True in peft"
            )
    return saved


def _shapes(model: GPT2, configs: Mapping[str, LoRAConfig]) -> dict[str, torch.Size]:
    """Return the shapes that the parameters of adapters on these layers, each with its own config, would have."""
    shapes = {}
    for name, config in configs.items():
        n_in, n_out = model.get_parameter(f"{name}.weight").shape
        shapes[f"{name}.lora_A"] = torch.Size((config.rank, n_in))
        shapes[f"{name}.lora_B"] = torch.Size((n_out, config.rank))
    return shapes


def _without_idle_targets(lora: LoRAConfig, model: GPT2) -> LoRAConfig:
    """Remove targets that match no layer, because users of peft list the layers of several architectures at once."""
    if isinstance(lora.target_modules, str):
        return lora
    layers = [f"transformer.{name}" for name, _ in model.named_modules()]
    used = tuple(target for target in lora.targets if matching(lora, target, layers))
    return replace(lora, target_modules=used) if used else lora


def _check_task(adapter: Adapter, head: nn.Module | None) -> None:
    is_classifier = adapter.config.task_type == "SEQ_CLS"
    if is_classifier and head is None:
        raise CheckpointError(
            f"the adapter in {adapter.folder} belongs to a classifier, not to a language model: use gpt2 classify"
        )
    if head is not None and not is_classifier:
        raise CheckpointError(
            f"the adapter in {adapter.folder} belongs to a language model, not to a classifier: use gpt2 generate"
        )


def _check_fit(adapter: Adapter, tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    if wrong := misfits(tensors, shapes, limit=4):
        raise CheckpointError(
            f"the adapter in {adapter.folder} does not fit this model: {wrong}: name the model on which it was trained "
            f"({adapter.config.base_model})"
        )
