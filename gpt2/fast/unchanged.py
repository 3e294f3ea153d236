"""Checks whether a model computes the same as `model.py`. It depends on the model's classes and on torch's tables of hooks.

Users change models: they replace methods of a class or of an object, register hooks, replace layers or set attributes. These
checks find such changes. Anything unknown counts as a change, and generation then calls `model(x)` itself.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from gpt2 import model as model_file
from gpt2.model import ACTIVATIONS, GPT2, MLP, Block, CausalSelfAttention, Conv1D, TokenEmbedding
from gpt2.quantization.layers import Int8Embedding, Int8Linear
from gpt_config.model_config import GPT2Config

# Methods that run when a module is called, and when an attribute is read.
_CALLING = (
    *("forward", "__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward", "_compiled_call_impl"),
    *("__getattr__", "__getattribute__"),
)

# Methods that do not run in a forward pass.
_NOT_COMPUTING = {"__init__", "_init_weights", "set_dropout", "reset_parameters", "_fill_padding_idx_with_zero"}

# The names of the modules and tensors of an object of each class.
_PARTS: dict[type[nn.Module], tuple[str, ...]] = {
    GPT2: ("wte", "wpe", "h", "ln_f"),
    Block: ("ln_1", "attn", "ln_2", "mlp"),
    CausalSelfAttention: ("c_attn", "c_proj"),
    MLP: ("c_fc", "c_proj"),
    **dict.fromkeys((nn.LayerNorm, Conv1D), ("weight", "bias")),
    **dict.fromkeys((nn.Embedding, TokenEmbedding), ("weight",)),
    **dict.fromkeys((Int8Embedding, Int8Linear), ("weight_int8", "scale", "bias")),
    nn.ModuleList: (),
}

# The activations that an MLP may apply, and their names in `BlockParts`.
_ACTIVATIONS: tuple[tuple[Callable[[Tensor], Tensor], str], ...] = (
    (ACTIVATIONS["gelu_new"], "tanh"),
    (F.gelu, "none"),
    (F.relu, "relu"),
)


# The globals that `model.py` uses when it computes. The contents of torch.nn.functional are not checked.
_GLOBALS = {name: vars(model_file)[name] for name in ("F", "positions_of", "visible_slots", "dropout", "Tensor")}


class _Original:
    """The methods of a class at the time when this module was imported."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self._class, self._parts = cls, _PARTS[cls]
        bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
        own = {name for base in bases for name, value in vars(base).items() if isinstance(value, FunctionType)}
        names = sorted(name for name in own - _NOT_COMPUTING | {*_CALLING} if hasattr(cls, name))
        self._methods_of = operator.attrgetter(*names)
        self._methods = self._methods_of(cls)
        self._functions = [method for method in self._methods if isinstance(method, FunctionType)]
        self._codes = [function.__code__ for function in self._functions]
        self._other_names = _names_of_other_things(cls)
        # If the class was changed before that, a method comes from another file.
        self._is_sound = all(_is_from(cls, function) for function in self._functions)
        # Attributes of an object with these names would hide the methods or the parts of its class.
        self.hiding = frozenset({*names, *self._parts})

    def is_unchanged(self) -> bool:
        """Return whether the class still has these methods, and no new attribute that would hide the parts of an object."""
        cls = self._class
        return (
            self._is_sound
            and self.runs_in(cls)
            and [function.__code__ for function in self._functions] == self._codes
            and self._other_names == _names_of_other_things(cls)
        )

    def runs_in(self, cls: type[nn.Module]) -> bool:
        """Return whether `cls`, this class or a subclass, has the same methods and no attribute that would hide parts."""
        return bool(self._methods_of(cls) == self._methods) and not any(map(functools.partial(hasattr, cls), self._parts))


def _names_of_other_things(cls: type) -> set[str]:
    """Return the names of a class's properties and constants, without functions and the names that Python adds."""
    return {name for name, value in vars(cls).items() if type(value) is not FunctionType and not name.startswith("__")}


def _is_from(cls: type, function: FunctionType) -> bool:
    """Return whether a function was defined in the body of the class or of one of its base classes."""
    if function is getattr(nn.modules.module, "_forward_unimplemented", None):
        return True
    written_in = [(base.__qualname__, vars(sys.modules[base.__module__])) for base in cls.__mro__]
    class_name = function.__code__.co_qualname.rpartition(".")[0]
    return any(class_name == name and function.__globals__ is names for name, names in written_in)


_ORIGINALS = {cls: _Original(cls) for cls in _PARTS}
_call_of = operator.attrgetter(*(name for name in _CALLING if hasattr(GPT2, name)))


def is_called_as_written(model: GPT2) -> bool:
    """Return whether `model(...)` only calls the model's own `hidden_states` and `logits`."""
    return (
        isinstance(model, GPT2)
        and all(vars(model_file).get(name) is value for name, value in _GLOBALS.items())
        and _ORIGINALS[GPT2].is_unchanged()
        and bool(_call_of(type(model)) == _call_of(GPT2))
        and vars(model).keys().isdisjoint(_CALLING)
        and not (model._forward_hooks or model._forward_pre_hooks or _has_global_hooks())
    )


def computes_as_written(model: GPT2) -> bool:
    """Return whether `model` is in eval mode and its forward pass depends only on `model.py`, its weights and its config."""
    return (
        is_called_as_written(model)
        and all(original.is_unchanged() for original in _ORIGINALS.values())
        and _ORIGINALS[GPT2].runs_in(type(model))
        and not model.training
        and _is_untouched(model, GPT2)
        and _has_known_ends(model)
        and _has_known_blocks(model)
        and not _is_watched(model.device.type)
    )


def keeps_layers_apart(model: GPT2) -> bool:
    """Return whether each attention has separate keys and values in a `KVCache` for the model's config.

    It is False if a layer occurs twice, or if its heads differ from the config. Such a model computes without a cache.
    """
    modules = [
        module for _, module in model.named_modules(remove_duplicate=False) if isinstance(module, CausalSelfAttention)
    ]
    shape, n_layer = (model.config.n_head, model.config.head_dim), model.config.n_layer
    layers = {attn.layer for attn in modules if (attn.n_head, attn.head_dim) == shape and 0 <= attn.layer < n_layer}
    return len(layers) == len(modules)


def activation_name(activation: object) -> str | None:
    """Return the name of the function in `BlockParts`, or None if it is unknown."""
    return next((name for known, name in _ACTIVATIONS if activation is known), None)


def _has_global_hooks() -> bool:
    """Return whether global hooks are registered. torch's tables are private; if they are missing, assume that there are."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return any(getattr(nn.modules.module, name, True) for name in names)


def _is_watched(device_type: str) -> bool:
    """Return whether something intercepts torch's operations: autocast, or a mode that may replace results."""
    if torch.amp.autocast_mode.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return True
    # A default device is such a mode too. It is allowed, because the plan names the device of each new tensor.
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else []
    return any(type(mode) is not DeviceContext for mode in modes) or torch._C._len_torch_dispatch_stack() > 0


def _is_untouched(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Return whether an object has the methods of its class and no forward hooks. Backward hooks are allowed."""
    own = vars(module)
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"]) and _ORIGINALS[cls].hiding.isdisjoint(own)


def _is_plain(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Return whether `module` is an untouched object of exactly this class."""
    return module is not None and type(module) is cls and _is_untouched(module, cls)


def _has_known_ends(model: GPT2) -> bool:
    wte, wpe, blocks, ln_f = map(model._modules.get, _PARTS[GPT2])
    if wpe is None or not _is_plain(wpe, nn.Embedding):
        return False
    like = wpe._parameters["weight"]
    return (
        like is not None
        and _is_known_head(wte, like)
        and _is_table(wpe, like)
        and _is_known_norm(ln_f, model.config, like)
        and _is_plain(blocks, nn.ModuleList)
        and len(cast(nn.ModuleList, blocks)) == model.config.n_layer
    )


def _is_known_head(wte: nn.Module | None, like: Tensor) -> bool:
    if wte is not None and _is_plain(wte, TokenEmbedding):
        return _is_table(wte, like)
    return wte is not None and _is_plain(wte, Int8Embedding) and _has_known_bytes(wte, like)


def _is_table(embedding: nn.Module, like: Tensor) -> bool:
    """Return whether the embedding is a known tensor and does not change rows when they are looked up."""
    return vars(embedding)["max_norm"] is None and _is_known(embedding._parameters["weight"], like)


def _has_known_blocks(model: GPT2) -> bool:
    like, blocks = model.wpe.weight, list(model.h._modules.values())
    if not all(_is_known_block(block, place, model.config, like) for place, block in enumerate(blocks)):
        return False
    kinds = {type(layer) for block in cast(list[Block], blocks) for layer in _layers_of(block)}
    return len(kinds) == 1


def _layers_of(block: Block) -> Iterator[nn.Module | None]:
    for name in ("attn", "mlp"):
        part = block._modules[name]
        assert part is not None  # the block is a known one
        yield from part._modules.values()


def _is_known_block(block: nn.Module | None, place: int, config: GPT2Config, like: Tensor) -> bool:
    if block is None or not _is_plain(block, Block):
        return False
    ln_1, attn, ln_2, mlp = map(block._modules.get, _PARTS[Block])
    return (
        _is_known_norm(ln_1, config, like)
        and _is_known_attention(attn, place, config)
        and _has_known_layers(attn, CausalSelfAttention, like)
        and _is_known_norm(ln_2, config, like)
        and _is_plain(mlp, MLP)
        and not cast(MLP, mlp).training
        and activation_name(vars(mlp).get("activation")) is not None
        and _has_known_layers(mlp, MLP, like)
    )


def _is_known_attention(attn: nn.Module | None, place: int, config: GPT2Config) -> bool:
    if not _is_plain(attn, CausalSelfAttention):
        return False
    n_head, head_dim, layer, scale = map(vars(attn).get, ("n_head", "head_dim", "layer", "scale"))
    return (
        not vars(attn)["training"]
        and (n_head, head_dim, layer) == (config.n_head, config.head_dim, place)
        and type(scale) in (float, int)
    )


def _is_known_norm(norm: nn.Module | None, config: GPT2Config, like: Tensor) -> bool:
    if norm is None or not _is_plain(norm, nn.LayerNorm):
        return False
    own = vars(norm)
    is_over_features = own["normalized_shape"] == (config.n_embd,) and type(own["eps"]) in (float, int)
    return is_over_features and all(_is_known(norm._parameters[name], like) for name in ("weight", "bias"))


def _has_known_layers(parent: nn.Module | None, cls: type[nn.Module], like: Tensor) -> bool:
    assert parent is not None
    return all(_is_known_layer(parent._modules.get(name), like) for name in _PARTS[cls])


def _is_known_layer(layer: nn.Module | None, like: Tensor) -> bool:
    if layer is not None and _is_plain(layer, Conv1D):
        return all(_is_known(layer._parameters[name], like) for name in ("weight", "bias"))
    return layer is not None and _is_plain(layer, Int8Linear) and _has_known_bytes(layer, like)


def _has_known_bytes(layer: nn.Module, like: Tensor) -> bool:
    weight_int8, scale, bias = (layer._buffers[name] for name in ("weight_int8", "scale", "bias"))
    is_known = type(weight_int8) is Tensor and weight_int8.dtype == torch.int8
    return is_known and _is_known(scale, like) and (bias is None or _is_known(bias, like))


def _is_known(weight: Tensor | None, like: Tensor) -> bool:
    """Return whether `weight` is a plain tensor or parameter, not a subclass, with the dtype and device of `like`."""
    has_no_arithmetic = type(weight) is nn.Parameter or type(weight) is Tensor
    return weight is not None and has_no_arithmetic and weight.dtype is like.dtype and weight.device == like.device
