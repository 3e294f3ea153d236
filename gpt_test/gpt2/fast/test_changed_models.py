"""Models that a user has changed: on every path, greedy ids are the argmax of `model(x)`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from gpt2 import GPT2, complete, stream
from gpt2 import model as architecture
from gpt2.fast.limits import NOTHING_FAST, FastLimits
from gpt2.fast.plan import DecodePlan
from gpt2.generation.batch import Batch
from gpt2.generation.loop import decode, start
from gpt2.model import MLP, Block, CausalSelfAttention, Conv1D, TokenEmbedding
from gpt2.positions import positions_of
from gpt_config import GenerationConfig, GPT2Config
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model

N = 8  # new tokens
TEXTS = ["the cat and the cat and the", "Every day"]

# A function that changes a model until the test ends.
Change = Callable[[GPT2, contextlib.ExitStack], object]


def tilted(y: Tensor) -> Tensor:
    """Return a different tensor of the same shape; each token is changed by itself."""
    return y * torch.linspace(-1.5, 1.5, y.shape[-1], dtype=y.dtype)


def tilting(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def changed(*args: Any, **kwargs: Any) -> Tensor:
        return tilted(method(*args, **kwargs))

    return changed


def replace(stack: contextlib.ExitStack, owner: Any, name: str, value: object) -> None:
    """Set an attribute of a class or object, and restore it at the end."""
    had, before = name in vars(owner), vars(owner).get(name)
    stack.callback(lambda: setattr(owner, name, before) if had else delattr(owner, name))
    setattr(owner, name, value)


def method_of_class(cls: type, name: str) -> Change:
    return lambda model, stack: replace(stack, cls, name, tilting(getattr(cls, name)))


def method_of_object(path: str, name: str) -> Change:
    def change(model: GPT2, stack: contextlib.ExitStack) -> None:
        module = model.get_submodule(path)
        setattr(module, name, tilting(getattr(module, name)))

    return change


def method_of_subclass(name: str) -> Change:
    def change(model: GPT2, stack: contextlib.ExitStack) -> None:
        model.__class__ = type("Own", (GPT2,), {name: tilting(getattr(GPT2, name))})

    return change


def calling_of_class(cls: type, name: str) -> Change:
    """Replace a method that the class inherits from `nn.Module`."""

    def change(model: GPT2, stack: contextlib.ExitStack) -> None:
        original = getattr(nn.Module, name)
        replace(stack, cls, name, lambda self, *args, **kwargs: tilted(original(self, *args, **kwargs)))

    return change


def calling_of_all(model: GPT2, stack: contextlib.ExitStack) -> None:
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        y = original(self, *args, **kwargs)
        return tilted(y) if isinstance(self, MLP) else y

    replace(stack, nn.Module, "__call__", call)


def hook(path: str, *, with_kwargs: bool = False) -> Change:
    def change(model: GPT2, stack: contextlib.ExitStack) -> None:
        if with_kwargs:
            model.get_submodule(path).register_forward_hook(lambda m, a, k, y: tilted(y), with_kwargs=True)
        else:
            model.get_submodule(path).register_forward_hook(lambda m, a, y: tilted(y))

    return change


def pre_hook(path: str, *, with_kwargs: bool = False) -> Change:
    def change(model: GPT2, stack: contextlib.ExitStack) -> None:
        if with_kwargs:
            model.get_submodule(path).register_forward_pre_hook(
                lambda m, args, kwargs: ((tilted(args[0]), *args[1:]), kwargs), with_kwargs=True
            )
        else:
            model.get_submodule(path).register_forward_pre_hook(lambda m, args: (tilted(args[0]), *args[1:]))

    return change


def global_hook(cls: type) -> Change:
    def change(model: GPT2, stack: contextlib.ExitStack) -> None:
        def on_output(module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
            return tilted(y) if isinstance(module, cls) else None

        stack.callback(nn.modules.module.register_module_forward_hook(on_output).remove)

    return change


def global_pre_hook(model: GPT2, stack: contextlib.ExitStack) -> None:
    def on_input(module: nn.Module, args: Any) -> Any:
        return (tilted(args[0]),) if isinstance(module, MLP) else None

    stack.callback(nn.modules.module.register_module_forward_pre_hook(on_input).remove)


def attribute(path: str, **values: Any) -> Change:
    def change(model: GPT2, stack: contextlib.ExitStack) -> None:
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)

    return change


def repeated_layer(model: GPT2, stack: contextlib.ExitStack) -> None:
    model.h[1] = model.h[0]


def repeated_attention(model: GPT2, stack: contextlib.ExitStack) -> None:
    model.h[1].attn = model.h[0].attn


def swapped_layers(model: GPT2, stack: contextlib.ExitStack) -> None:
    model.h[0], model.h[1] = model.h[1], model.h[0]


def fewer_layers(model: GPT2, stack: contextlib.ExitStack) -> None:
    model.h = model.h[:1]


def more_layers(model: GPT2, stack: contextlib.ExitStack) -> None:
    model.h.append(copy.deepcopy(model.h[0]))
    model.h[-1].attn.layer = len(model.h) - 1


class Backwards(nn.ModuleList):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(super().__iter__()))


def reversed_layers(model: GPT2, stack: contextlib.ExitStack) -> None:
    model.h = Backwards(model.h)


def reversed_layers_by_class(model: GPT2, stack: contextlib.ExitStack) -> None:
    original = nn.ModuleList.__iter__
    replace(stack, nn.ModuleList, "__iter__", lambda self: reversed(list(original(self))))


def custom_block(model: GPT2, stack: contextlib.ExitStack) -> None:
    class Own(Block):
        def forward(self, x: Tensor, mask: Tensor | None, store: Any) -> Tensor:
            return x + tilted(self.mlp(self.ln_2(x)))

    model.h[1].__class__ = Own


class Louder(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return tilted(weight)


def parametrization(model: GPT2, stack: contextlib.ExitStack) -> None:
    parametrize.register_parametrization(model.h[1].mlp.c_fc, "weight", Louder())


def old_weight_norm(model: GPT2, stack: contextlib.ExitStack) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.h[1].mlp.c_fc)
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight_g.mul_(torch.linspace(-2, 2, 24)[:, None])


def new_weight_norm(model: GPT2, stack: contextlib.ExitStack) -> None:
    nn.utils.parametrizations.weight_norm(model.h[1].mlp.c_fc)
    with torch.no_grad():
        model.h[1].mlp.c_fc.parametrizations.weight.original0.mul_(torch.linspace(-2, 2, 24)[:, None])


def property_of_class(model: GPT2, stack: contextlib.ExitStack) -> None:
    replace(stack, CausalSelfAttention, "scale", property(lambda self: 9.0))


def code_of_method(model: GPT2, stack: contextlib.ExitStack) -> None:
    def forward(self: Any, x: Any) -> Any:
        return -self.c_proj(self.activation(self.c_fc(x)))

    before = MLP.forward.__code__
    stack.callback(lambda: setattr(MLP.forward, "__code__", before))
    MLP.forward.__code__ = forward.__code__


def function_mode(model: GPT2, stack: contextlib.ExitStack) -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            y = func(*args, **(kwargs or {}))
            return tilted(y) if func is F.layer_norm else y

    stack.enter_context(Mode())


def autocast(model: GPT2, stack: contextlib.ExitStack) -> None:
    stack.enter_context(torch.autocast("cpu", torch.bfloat16))


def default_dtype(model: GPT2, stack: contextlib.ExitStack) -> None:
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float64)


METHODS = (
    *((Block, "forward"), (CausalSelfAttention, "forward"), (MLP, "forward"), (nn.LayerNorm, "forward")),
    *((nn.Embedding, "forward"), (TokenEmbedding, "forward"), (Conv1D, "forward"), (TokenEmbedding, "logits")),
    *((architecture.GPT2, name) for name in ("embed", "stream", "logits", "hidden_states", "forward")),
)
PLACES = (
    *(("h.1", "forward"), ("h.0.attn", "forward"), ("h.1.mlp", "forward"), ("h.0.ln_2", "forward"), ("ln_f", "forward")),
    *(("wte", "forward"), ("wpe", "forward"), ("h.1.attn.c_proj", "forward"), ("wte", "logits"), ("h.0.mlp", "_call_impl")),
    *(("", name) for name in ("embed", "stream", "logits", "hidden_states", "forward", "_call_impl")),
)
CHANGES: dict[str, Change] = {
    **{f"{cls.__name__}.{name}": method_of_class(cls, name) for cls, name in METHODS},
    **{f"object {path or 'model'}.{name}": method_of_object(path, name) for path, name in PLACES},
    **{f"subclass {name}": method_of_subclass(name) for name in ("embed", "stream", "logits", "hidden_states", "forward")},
    **{f"MLP{name}": calling_of_class(MLP, name) for name in ("__call__", "_call_impl")},
    **{f"GPT2{name}": calling_of_class(GPT2, name) for name in ("__call__", "_call_impl")},
    "Module.__call__": calling_of_all,
    "a global of model.py": lambda model, stack: replace(
        stack, architecture, "positions_of", lambda *args: positions_of(*args) // 2
    ),
    **{f"hook {path or 'model'}": hook(path) for path in ("h.0", "h.1.mlp", "h.1.attn.c_attn", "wte", "ln_f", "")},
    **{f"pre-hook {path}": pre_hook(path) for path in ("h.0", "h.1.mlp", "ln_f")},
    "hook with kwargs": hook("h.1", with_kwargs=True),
    "pre-hook with kwargs": pre_hook("h.1", with_kwargs=True),
    **{f"global hook {cls.__name__}": global_hook(cls) for cls in (MLP, nn.LayerNorm, GPT2)},
    "global pre-hook": global_pre_hook,
    "repeated layer": repeated_layer,
    "repeated attention": repeated_attention,
    "swapped layers": swapped_layers,
    "fewer layers": fewer_layers,
    "more layers": more_layers,
    "reversed layers": reversed_layers,
    "ModuleList.__iter__": reversed_layers_by_class,
    "custom block": custom_block,
    "eps of one norm": attribute("h.1.ln_2", eps=9.0),
    "eps of the last norm": attribute("ln_f", eps=90.0),
    "scale": attribute("h.0.attn", scale=9.0),
    "heads": attribute("h.0.attn", n_head=1, head_dim=24),
    "layer": attribute("h.1.attn", layer=0),
    "known activation": attribute("h.1.mlp", activation=F.relu),
    "unknown activation": attribute("h.1.mlp", activation=torch.sin),
    "activation as a module": attribute("h.1.mlp", activation=nn.Hardtanh()),
    "max_norm": attribute("wpe", max_norm=0.5),
    "parametrization": parametrization,
    "old weight_norm": old_weight_norm,
    "new weight_norm": new_weight_norm,
    "property of a class": property_of_class,
    "code of a method": code_of_method,
    "function mode": function_mode,
    "autocast": autocast,
    "default dtype": default_dtype,
}

# Changes after which the model still computes the same, except for rounding.
SAME = {"default dtype", "autocast", "layer"}


@torch.inference_mode()
def argmax_loop(model: GPT2, ids: list[int], n: int = N) -> list[int]:
    for _ in range(n):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return ids[-n:]


def new_ids(model: GPT2, prompts: list[list[int]], fast: FastLimits, **options: Any) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=N, stop_at_eot=False, **options)
    rows = start(model, prompts, config)
    for _ in decode(Batch(model, fast=fast), rows):
        pass
    return [row.ids for row in rows]


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_every_path_gives_the_argmax_of_the_call(
    name: str, small_config: GPT2Config, small_tokenizer: GPT2Tokenizer
) -> None:
    prompts = [small_tokenizer.encode(text) for text in TEXTS]
    with contextlib.ExitStack() as stack:
        model = random_model(small_config, positions=0.5)
        unchanged = [argmax_loop(model, ids) for ids in prompts]
        CHANGES[name](model, stack)
        expected = [argmax_loop(model, ids) for ids in prompts]
        assert (expected == unchanged) is (name in SAME)
        options: dict[str, Any] = {"max_new_tokens": N, "stop_at_eot": False}
        first = torch.tensor(prompts[:1])
        assert model.generate(first, **options)[0, first.shape[1] :].tolist() == expected[0]
        assert [c.ids for c in complete(model, small_tokenizer, TEXTS[:1], **options)] == expected[:1]
        text = "".join(stream(model, small_tokenizer, TEXTS[0], **options))
        assert text == small_tokenizer.decode(expected[0])
        plain = model.generate(first, num_beams=2, use_cache=False, **options)
        assert torch.equal(model.generate(first, num_beams=2, **options), plain)
        eager = FastLimits(costs_of_drafts=(0.1, 0.1))
        assert new_ids(model, prompts[:1], eager, speculate=True) == expected[:1]
        assert new_ids(model, prompts, FastLimits()) == expected  # a batch, padded
        assert new_ids(model, prompts, NOTHING_FAST) == expected


def test_changes_are_undone(small_config: GPT2Config) -> None:
    assert DecodePlan.fits(random_model(small_config))


def test_harmless_changes_do_not_disable_the_plan(small_config: GPT2Config) -> None:
    """Otherwise every model would be slow, and the tests above would still pass."""
    model = random_model(small_config)
    model.register_full_backward_hook(lambda *_: None)
    model.notes = "mine"
    model.h[1].mlp.activation = F.relu
    model.h[1].ln_1.eps = 1.0
    model.h[0].attn.scale = 0.25
    model.__class__ = type("Own", (GPT2,), {"summary": lambda self: "mine"})
    assert DecodePlan.fits(model)
    with torch.device("cpu"):
        assert DecodePlan.fits(model)


def test_without_the_fast_paths_the_ids_are_the_same(small_config: GPT2Config) -> None:
    model, prompts = random_model(small_config, positions=0.5), [[5, 6, 5, 6, 5], [7, 8]]
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "seed": 1}, {"speculate": True}):
        assert new_ids(model, prompts, FastLimits(), **options) == new_ids(model, prompts, NOTHING_FAST, **options)
