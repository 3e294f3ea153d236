"""LoRA (Hu et al. 2021): low-rank adapters on frozen layers. Depends on modules, not on files.

A layer with an adapter keeps its own parameters under their own names. So the state dict of a model with adapters is that of
the model, plus two tensors for each layer with an adapter, "....lora_A" and "....lora_B".
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.adapters.targets import layer_configs, matching
from gpt2.dropout import dropout
from gpt2.model import GPT2, Conv1D
from gpt2.quantization.quantize import check_can_learn
from gpt_config.errors import ConfigError
from gpt_config.lora_config import LoRAConfig

_IN_MODEL = "transformer."  # targets are compared with the names of transformers' modules


class LoRAConv1D(Conv1D):
    """y = x W + b + scale * (x A^T) B^T: a frozen Conv1D with a trainable adapter of rank r.

    W (n_in, n_out) and b (n_out,) are the parameters of `base`, not copies. A is (r, n_in) and B is (n_out, r), as in peft's
    files. B is zero at first (section 4.1), so a new adapter does not change the output.
    """

    def __init__(self, base: Conv1D, config: LoRAConfig, own: LoRAConfig | None = None) -> None:
        """`config` is that of the whole adapter; `own` has the rank and alpha of this layer, if they are others."""
        nn.Module.__init__(self)
        self.config, own = config, own or config
        self.scale = own.scale
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        n_in, n_out = base.weight.shape
        self.lora_A = nn.Parameter(base.weight.new_empty(own.rank, n_in))
        self.lora_B = nn.Parameter(base.weight.new_zeros(n_out, own.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        narrow = F.linear(dropout(x, self.config.dropout, self.training), self.lora_A)  # (..., r)
        return super().forward(x) + F.linear(narrow * self.scale, self.lora_B)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return W + scale * (B A)^T, (n_in, n_out) in W's dtype. It is computed in float32 or higher, and rounded once."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        update = self.lora_A.to(exact).t() @ self.lora_B.to(exact).t()
        return self.weight.to(exact).add(update, alpha=self.scale).to(self.weight.dtype)


def add_lora(model: GPT2, config: LoRAConfig) -> None:
    """Add a new adapter to each layer that `config` names, in place.

    After that, only the adapters and the modules that are saved as a whole require gradients.

    ConfigError if a target matches no layer, if a pattern takes seconds, or if the model already has adapters.

    >>> import gpt2
    >>> model = gpt2.GPT2.from_pretrained("gpt2-tiny")
    >>> add_lora(model, LoRAConfig(rank=4, target_modules=("c_attn",)))
    >>> sum(parameter.numel() for parameter in lora_parameters(model))
    24576
    """
    check_can_learn(model)
    modules = target_configs(model, config)
    model.requires_grad_(False)
    for name, own in modules.items():
        _replace(model, name, LoRAConv1D(_conv1d(model, name), config, own))
    for name in saved_parameters(model, config):
        model.get_parameter(name).requires_grad_(True)


def merge_lora(model: GPT2) -> None:
    """Add each adapter to the weight of its layer, in place. The result is an ordinary model that computes the same.

    All its parameters require gradients. A model without adapters does not change.
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


def target_configs(model: GPT2, config: LoRAConfig) -> dict[str, LoRAConfig]:
    """Return the layers that get an adapter, such as "h.0.attn.c_attn", each with its own rank and alpha.

    Errors are those of `add_lora`.
    """
    if any(True for _ in lora_modules(model)):
        raise ConfigError("the model already has adapters: merge them first, or load the model again")
    layers = [_IN_MODEL + name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    chosen: set[str] = set()
    for target in config.targets:
        hits = matching(config, target, layers)
        if not hits:
            raise ConfigError(f"target_modules: {target!r} matches no layer of GPT-2, which has c_attn, c_proj and c_fc")
        chosen |= hits
    configs = layer_configs(config, [name for name in layers if name in chosen])
    return {name.removeprefix(_IN_MODEL): own for name, own in configs.items()}


def saved_parameters(model: GPT2, config: LoRAConfig) -> list[str]:
    """Return the names of the parameters of the modules that an adapter saves as a whole, such as "wte.weight"."""
    return [name for name, _ in model.named_parameters() if config.saves(f"transformer.{name.rpartition('.')[0]}")]


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoRAConv1D]]:
    """Yield (name, layer) for each layer with an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, LoRAConv1D):
            yield name, module


def named_lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) for the parameters of all adapters, "....lora_A" and "....lora_B"."""
    for name, module in lora_modules(model):
        yield f"{name}.lora_A", module.lora_A
        yield f"{name}.lora_B", module.lora_B


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of all adapters."""
    for _, parameter in named_lora_parameters(model):
        yield parameter


def merged_parameters(model: GPT2) -> dict[str, Tensor]:
    """Return what `model.state_dict()` would return after `merge_lora`, without changing the model."""
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
