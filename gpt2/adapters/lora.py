"""LoRA (Hu et al. 2021): low-rank adapters beside frozen layers. It knows modules, and nothing of files.

A layer with an adapter keeps its own parameters under their own names, so that the state dict of a model with adapters is
that of the model and two more tensors a layer, "....lora_A" and "....lora_B".
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.dropout import dropout
from gpt2.model import GPT2, Conv1D
from gpt2.quantization.quantize import check_can_learn
from gpt_config.errors import ConfigError
from gpt_config.lora_config import LoRAConfig


class LoRAConv1D(Conv1D):
    """y = x W + b + scale * (x A^T) B^T: a frozen Conv1D, and an adapter of rank r that learns.

    W is (n_in, n_out) and b (n_out,), the very parameters of `base`; A is (r, n_in) and B (n_out, r), as peft stores them.
    B begins as zero (section 4.1), so a new adapter changes nothing.
    """

    def __init__(self, base: Conv1D, config: LoRAConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        n_in, n_out = base.weight.shape
        self.lora_A = nn.Parameter(base.weight.new_empty(config.rank, n_in))
        self.lora_B = nn.Parameter(base.weight.new_zeros(n_out, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        narrow = F.linear(dropout(x, self.config.dropout, self.training), self.lora_A)  # (..., r)
        return super().forward(x) + F.linear(narrow * self.config.scale, self.lora_B)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scale * (B A)^T (n_in, n_out), in W's dtype; computed in float32 at least, and rounded once."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        update = self.lora_A.to(exact).t() @ self.lora_B.to(exact).t()
        return self.weight.to(exact).add(update, alpha=self.config.scale).to(self.weight.dtype)


def add_lora(model: GPT2, config: LoRAConfig) -> None:
    """Put a new adapter on each layer that `config` names, in place. Nothing but the adapters will learn.

    ConfigError if a target matches no layer, or if the model has adapters already.

    >>> import gpt2
    >>> model = gpt2.GPT2.from_pretrained("gpt2-tiny")
    >>> add_lora(model, LoRAConfig(rank=4, target_modules=("c_attn",)))
    >>> sum(parameter.numel() for parameter in lora_parameters(model))
    24576
    """
    check_can_learn(model)
    modules = target_names(model, config)
    model.requires_grad_(False)
    for name in modules:
        _replace(model, name, LoRAConv1D(_conv1d(model, name), config))


def merge_lora(model: GPT2) -> None:
    """Add each adapter to its layer's weight, in place: an ordinary model that computes the same, and can learn as a whole.

    A model without adapters stays as it is.
    """
    adapters = list(lora_modules(model))
    for name, adapter in adapters:
        with torch.device("meta"):
            plain = Conv1D(*adapter.weight.shape)
        plain.weight, plain.bias = adapter.weight, adapter.bias
        with torch.no_grad():
            plain.weight.copy_(adapter.merged_weight())
        _replace(model, name, plain.train(adapter.training))
    if adapters:
        model.requires_grad_(True)


def target_names(model: GPT2, config: LoRAConfig) -> list[str]:
    """The names of the layers that get an adapter, such as "h.0.attn.c_attn"; errors as for `add_lora`."""
    if any(True for _ in lora_modules(model)):
        raise ConfigError("the model has adapters already: merge them first, or load it anew")
    layers = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    chosen = set()
    for target in config.targets:
        hits = {name for name in layers if config.hits(target, f"transformer.{name}")}
        if not hits:
            raise ConfigError(f"target_modules: {target!r} matches no layer of GPT-2, which has c_attn, c_proj and c_fc")
        chosen |= hits
    return [name for name in layers if name in chosen]


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoRAConv1D]]:
    """The layers that have an adapter, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRAConv1D):
            yield name, module


def named_lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters' parameters, "....lora_A" and "....lora_B", by name."""
    for name, module in lora_modules(model):
        yield f"{name}.lora_A", module.lora_A
        yield f"{name}.lora_B", module.lora_B


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The adapters' parameters."""
    for _, parameter in named_lora_parameters(model):
        yield parameter


def merged_parameters(model: GPT2) -> dict[str, Tensor]:
    """What `model.state_dict()` would be after `merge_lora`; the model stays as it is."""
    merged = {f"{name}.weight": module for name, module in lora_modules(model)}
    adapters = {name for name, _ in named_lora_parameters(model)}
    return {
        name: merged[name].merged_weight() if name in merged else tensor
        for name, tensor in model.state_dict().items()
        if name not in adapters
    }


def _conv1d(model: GPT2, name: str) -> Conv1D:
    module = model.get_submodule(name)
    assert isinstance(module, Conv1D)
    return module


def _replace(model: GPT2, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
