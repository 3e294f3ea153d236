"""Each component separately, forward and backward: NumPy and plain Python against PyTorch, PyTorch against transformers.

It defines the `Component`s; `component` compares them. A function of an engine is looked up in its module when the check
runs, so that a test can replace it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt2.model as torch_model
from gpt2.reference import numpy_gpt2, numpy_layers, python_gpt2, python_layers
from gpt2.verification.checks import Check
from gpt2.verification.component import Array, Component, Gradients, Inputs, Shape, normal


def component_checks() -> Iterator[Check]:
    """The checks of all components."""
    for component in COMPONENTS:
        yield from component.checks()


# ---- The parts of a layer -------------------------------------------------------------------------------------------


def _pointwise(forward: str, backward: str) -> Callable[[Inputs, Shape], tuple[Any, Callable[[Any], Gradients]]]:
    """A function of `numpy_layers` with one input `x`, by the names of its forward and backward functions."""

    def run(inputs: Inputs, shape: Shape) -> tuple[Any, Callable[[Any], Gradients]]:
        out, saved = getattr(numpy_layers, forward)(inputs["x"])
        return out, lambda d_out: {"x": getattr(numpy_layers, backward)(d_out, saved)}

    return run


def _by_row(function: Callable[[Any], Any], x: Any, depth: int = 2) -> Any:
    """Nested lists in which `function` has been applied to each item at `depth`."""
    return function(x) if depth == 0 else [_by_row(function, row, depth - 1) for row in x]


def _embedding_inputs(shape: Shape, rng: np.random.Generator) -> Inputs:
    return {"table": rng.standard_normal((shape.V, shape.C)), "ids": rng.integers(0, shape.V, (shape.B, shape.T))}


def _numpy_embedding(i: Inputs, shape: Shape) -> tuple[Any, Callable[[Any], Gradients]]:
    out, saved = numpy_layers.embedding_forward(i["table"], i["ids"])
    return out, lambda d_out: {"table": numpy_layers.embedding_backward(d_out, saved)}


def _numpy_layer_norm(i: Inputs, shape: Shape) -> tuple[Any, Callable[[Any], Gradients]]:
    out, saved = numpy_layers.layer_norm_forward(i["x"], i["weight"], i["bias"], _EPSILON)
    names = ("x", "weight", "bias")
    return out, lambda d_out: dict(zip(names, numpy_layers.layer_norm_backward(d_out, saved), strict=True))


def _numpy_linear(i: Inputs, shape: Shape) -> tuple[Any, Callable[[Any], Gradients]]:
    out, saved = numpy_layers.linear_forward(i["x"], i["weight"], i["bias"])
    names = ("x", "weight", "bias")
    return out, lambda d_out: dict(zip(names, numpy_layers.linear_backward(d_out, saved), strict=True))


def _torch_linear(i: dict[str, Tensor], shape: Shape) -> Tensor:
    return _called(torch_model.Conv1D(shape.C, 3 * shape.C), {"weight": i["weight"], "bias": i["bias"]}, i["x"])


def _numpy_attention_core(i: Inputs, shape: Shape) -> tuple[Any, Callable[[Any], Gradients]]:
    out, saved = numpy_layers.causal_attention_forward(i["q"], i["k"], i["v"], 0.7)
    names = ("q", "k", "v")
    return out, lambda d_out: dict(zip(names, numpy_layers.causal_attention_backward(d_out, saved), strict=True))


def _python_attention_core(i: dict[str, Any], shape: Shape) -> Any:
    return [
        [python_gpt2.attention_head(q, k, v, 0.7) for q, k, v in zip(*row, strict=True)]
        for row in zip(i["q"], i["k"], i["v"], strict=True)
    ]


def _numpy_tied_head(i: Inputs, shape: Shape) -> tuple[Any, Callable[[Any], Gradients]]:
    out, saved = numpy_layers.tied_head_forward(i["x"], i["table"])
    return out, lambda d_out: dict(zip(("x", "table"), numpy_layers.tied_head_backward(d_out, saved), strict=True))


def _cross_entropy_inputs(shape: Shape, rng: np.random.Generator) -> Inputs:
    logits = 3 * rng.standard_normal((shape.B, shape.T, shape.V))
    return {"logits": logits, "targets": rng.integers(0, shape.V, (shape.B, shape.T))}


def _numpy_cross_entropy(i: Inputs, shape: Shape) -> tuple[Any, Callable[[Any], Gradients]]:
    out, saved = numpy_layers.cross_entropy_forward(i["logits"], i["targets"])
    return out, lambda d_out: {"logits": numpy_layers.cross_entropy_backward(saved, float(d_out))}


def _numpy_dropout(i: Inputs, shape: Shape) -> tuple[Any, Callable[[Any], Gradients]]:
    out, saved = numpy_layers.dropout_forward(i["x"], _DROPOUT, np.random.default_rng(7))
    return out, lambda d_out: {"x": numpy_layers.dropout_backward(d_out, saved)}


def _torch_dropout(i: dict[str, Tensor], shape: Shape) -> Tensor:
    """The formula of dropout with NumPy's random numbers, because PyTorch's own dropout would draw others."""
    kept = np.random.default_rng(7).random(tuple(i["x"].shape), dtype=np.float32) >= _DROPOUT
    return torch.where(torch.from_numpy(kept), i["x"] / (1 - _DROPOUT), 0.0)


_EPSILON = 1e-5  # of layer norm
_DROPOUT = 0.3  # probability

# ---- Layers with parameters, under their published names ------------------------------------------------------------

_ATTENTION = {
    "attn.c_attn.weight": ("C", "3C"), "attn.c_attn.bias": ("3C",),
    "attn.c_proj.weight": ("C", "C"), "attn.c_proj.bias": ("C",),
}  # fmt: skip
_MLP = {
    "mlp.c_fc.weight": ("C", "4C"), "mlp.c_fc.bias": ("4C",),
    "mlp.c_proj.weight": ("4C", "C"), "mlp.c_proj.bias": ("C",),
}  # fmt: skip
_NORMS = {"ln_1.weight": ("C",), "ln_1.bias": ("C",), "ln_2.weight": ("C",), "ln_2.bias": ("C",)}


def _called(module: nn.Module, parameters: dict[str, Tensor], *arguments: Any) -> Tensor:
    """The output of `module` with these `parameters`, which must contain all of its parameters."""
    out: Tensor = torch.func.functional_call(module.eval(), parameters, arguments, strict=True)
    return out


def _without(prefix: str, i: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in i.items() if name != "x"}


def _columns(i: dict[str, Any]) -> dict[str, Any]:
    """The parameters as the plain Python engine stores them: the weight of a linear layer as its columns."""
    return {
        name: [list(column) for column in zip(*value, strict=True)] if "c_" in name and name.endswith("weight") else value
        for name, value in i.items()
    }


def _torch_attention(i: dict[str, Tensor], shape: Shape) -> Tensor:
    return _called(torch_model.CausalSelfAttention(shape.config, 0), _without("attn.", i), i["x"], None, None)


def _torch_mlp(i: dict[str, Tensor], shape: Shape) -> Tensor:
    return _called(torch_model.MLP(shape.config), _without("mlp.", i), i["x"])


def _torch_block(i: dict[str, Tensor], shape: Shape) -> Tensor:
    return _called(torch_model.Block(shape.config, 0), _without("", i), i["x"], None, None)


def _transformers_linear(i: dict[str, Tensor], shape: Shape) -> Tensor:
    from transformers.pytorch_utils import Conv1D

    return _called(Conv1D(3 * shape.C, shape.C), {"weight": i["weight"], "bias": i["bias"]}, i["x"])


def _transformers_config(shape: Shape) -> Any:
    from transformers import GPT2Config as TransformersConfig

    values: dict[str, Any] = {**shape.config.to_dict(), "attn_implementation": "sdpa"}
    return TransformersConfig(**values)


def _transformers_attention(i: dict[str, Tensor], shape: Shape) -> Tensor:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    return _called(GPT2Attention(_transformers_config(shape), layer_idx=0), _without("attn.", i), i["x"])[0]


def _transformers_mlp(i: dict[str, Tensor], shape: Shape) -> Tensor:
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    return _called(GPT2MLP(4 * shape.C, _transformers_config(shape)), _without("mlp.", i), i["x"])


def _transformers_block(i: dict[str, Tensor], shape: Shape) -> Tensor:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    out: Any = _called(GPT2Block(_transformers_config(shape), layer_idx=0), _without("", i), i["x"])
    return out if isinstance(out, Tensor) else out[0]  # some versions also return the attention weights


def _numpy_attention(i: Inputs, shape: Shape) -> tuple[Any, Callable[[Any], Gradients]]:
    out, saved = numpy_gpt2.attention_forward(i["x"], i, shape.config, 0)
    return out, lambda d_out: _named(numpy_gpt2.attention_backward(d_out, saved))


def _numpy_mlp(i: Inputs, shape: Shape) -> tuple[Any, Callable[[Any], Gradients]]:
    out, saved = numpy_gpt2.mlp_forward(i["x"], i, shape.config)
    return out, lambda d_out: _named(numpy_gpt2.mlp_backward(d_out, saved))


def _numpy_block(i: Inputs, shape: Shape) -> tuple[Any, Callable[[Any], Gradients]]:
    out, saved = numpy_gpt2.block_forward(i["x"], i, shape.config, 0)
    return out, lambda d_out: _named(numpy_gpt2.block_backward(d_out, saved))


def _named(result: tuple[Array, Gradients]) -> Gradients:
    d_x, gradients = result
    return {"x": d_x, **gradients}


def _python_linear(i: dict[str, Any], shape: Shape) -> Any:
    columns = [list(column) for column in zip(*i["weight"], strict=True)]
    return [python_layers.linear(row, columns, i["bias"]) for row in i["x"]]


def _first_visible(x: Any) -> Any:
    """The masked softmax of scores (B, T, T): row t sees the first t + 1 scores."""
    return [[python_layers.masked_softmax(scores, t + 1) for t, scores in enumerate(square)] for square in x]


def _torch_masked_softmax(i: dict[str, Tensor], shape: Shape) -> Tensor:
    later = torch.ones(shape.T, shape.T, dtype=torch.bool).triu(1)
    return i["x"].masked_fill(later, -torch.inf).softmax(-1)


_X = normal(x=("B", "T", "C"))
COMPONENTS = (
    Component(
        "matrix product",
        normal(a=("B", "T"), b=("T", "C")),
        lambda i, s: i["a"] @ i["b"],
        python=lambda i, s: python_layers.matmul(i["a"], i["b"]),
    ),
    Component(
        "transpose",
        normal(a=("B", "T")),
        lambda i, s: i["a"].mT,
        python=lambda i, s: python_layers.transpose(i["a"]),
    ),
    Component(
        "residual addition",
        normal(a=("T", "C"), b=("T", "C")),
        lambda i, s: i["a"] + i["b"],
        python=lambda i, s: python_layers.add(i["a"], i["b"]),
    ),
    Component(
        "embedding",
        _embedding_inputs,
        lambda i, s: F.embedding(i["ids"], i["table"]),
        _numpy_embedding,
        lambda i, s: [python_layers.embedding(i["table"], row) for row in i["ids"]],
    ),
    Component(
        "layer norm",
        normal(x=("B", "T", "C"), weight=("C",), bias=("C",)),
        lambda i, s: F.layer_norm(i["x"], (s.C,), i["weight"], i["bias"], _EPSILON),
        _numpy_layer_norm,
        lambda i, s: _by_row(lambda row: python_layers.layer_norm(row, i["weight"], i["bias"], _EPSILON), i["x"]),
    ),
    Component(
        "linear",
        normal(x=("B", "T", "C"), weight=("C", "3C"), bias=("3C",)),
        _torch_linear,
        _numpy_linear,
        _python_linear,
        _transformers_linear,
    ),
    Component(
        "GELU",
        _X,
        lambda i, s: torch_model.ACTIVATIONS["gelu_new"](i["x"]),
        _pointwise("gelu_forward", "gelu_backward"),
        lambda i, s: _by_row(python_layers.gelu, i["x"], 3),
    ),
    Component(
        "exact GELU",
        _X,
        lambda i, s: torch_model.ACTIVATIONS["gelu"](i["x"]),
        _pointwise("exact_gelu_forward", "exact_gelu_backward"),
        lambda i, s: _by_row(python_layers.exact_gelu, i["x"], 3),
    ),
    Component(
        "ReLU",
        _X,
        lambda i, s: torch_model.ACTIVATIONS["relu"](i["x"]),
        _pointwise("relu_forward", "relu_backward"),
        lambda i, s: _by_row(python_layers.relu, i["x"], 3),
    ),
    Component("dropout", _X, _torch_dropout, _numpy_dropout),
    Component(
        "softmax",
        normal(x=("B", "T", "V")),
        lambda i, s: i["x"].softmax(-1),
        _pointwise("softmax_forward", "softmax_backward"),
        lambda i, s: _by_row(python_layers.softmax, i["x"]),
    ),
    Component(
        "masked softmax",
        normal(x=("B", "T", "T")),
        _torch_masked_softmax,
        python=lambda i, s: _first_visible(i["x"]),
    ),
    Component(
        "probabilities at a temperature",
        normal(x=("B", "T", "V")),
        lambda i, s: (i["x"] / 0.7).softmax(-1),
        python=lambda i, s: _by_row(lambda row: python_gpt2.logits_to_probs(row, 0.7), i["x"]),
    ),
    Component(
        "causal attention",
        normal(q=("B", "H", "T", "D"), k=("B", "H", "T", "D"), v=("B", "H", "T", "D")),
        lambda i, s: F.scaled_dot_product_attention(i["q"], i["k"], i["v"], is_causal=True, scale=0.7),
        _numpy_attention_core,
        _python_attention_core,
    ),
    Component(
        "multi-head attention",
        normal(x=("B", "T", "C"), **_ATTENTION),
        _torch_attention,
        _numpy_attention,
        lambda i, s: [python_gpt2.multi_head_attention(row, _columns(i), s.config, 0) for row in i["x"]],
        _transformers_attention,
    ),
    Component(
        "MLP",
        normal(x=("B", "T", "C"), **_MLP),
        _torch_mlp,
        _numpy_mlp,
        lambda i, s: [python_gpt2.mlp(row, _columns(i), s.config) for row in i["x"]],
        _transformers_mlp,
    ),
    Component(
        "block",
        normal(x=("B", "T", "C"), **_NORMS, **_ATTENTION, **_MLP),
        _torch_block,
        _numpy_block,
        lambda i, s: [python_gpt2.block(row, _columns(i), s.config, 0) for row in i["x"]],
        _transformers_block,
    ),
    Component(
        "tied head",
        normal(x=("B", "T", "C"), table=("V", "C")),
        lambda i, s: i["x"] @ i["table"].mT,
        _numpy_tied_head,
        lambda i, s: _by_row(lambda row: python_gpt2.tied_head(row, i["table"]), i["x"]),
    ),
    Component(
        "cross-entropy",
        _cross_entropy_inputs,
        lambda i, s: F.cross_entropy(i["logits"].flatten(0, 1), i["targets"].flatten()),
        _numpy_cross_entropy,
    ),
)
