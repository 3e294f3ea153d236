"""The ONNX graph of GPT-2: what its inputs, outputs and nodes are called, and what they compute. It has no weights.

Inputs and outputs have the names of Hugging Face's optimum, which transformers.js and other programs know. One graph
computes prompts and single steps: the past is empty in the first call. The operators are those of ONNX's documentation.
B: batch, T: tokens of a call, P: tokens of the past, S = P + T, H = n_head, D = head_dim, C = n_embd, V = vocab_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2.formats.layout import TANH_GELU
from gpt_config.model_config import GPT2Config

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Gelu and LayerNormalization are operators of this version; onnxruntime 1.18 and later read it.
OPSET, IR_VERSION = 20, 10

_BATCH, _TOKENS, _PAST, _ALL = (
    "batch_size", "sequence_length", "past_sequence_length", "past_sequence_length + sequence_length",
)  # fmt: skip


class _Graph:
    """Nodes in the order in which they are computed, and constants."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, operator: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output, which has the node's name."""
        return self.split(operator, name, [name], *inputs, **attributes)[0]

    def split(self, operator: str, name: str, outputs: list[str], *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        from onnx import helper

        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name=name, **attributes))
        return outputs

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Add a constant."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def linear(self, module: str, x: str) -> str:
        """y = x W + b, with W of shape (inputs, outputs) as published."""
        product = self.add("MatMul", f"{module}.product", x, f"{module}.weight")
        return self.add("Add", module, product, f"{module}.bias")

    def norm(self, module: str, x: str, epsilon: float) -> str:
        """A layer norm."""
        return self.add(
            "LayerNormalization", module, x, f"{module}.weight", f"{module}.bias", axis=-1, epsilon=epsilon
        )  # fmt: skip


def build_graph(config: GPT2Config, weights: list[Any]) -> Any:
    """Return the GraphProto with these initializers, which have the published names and shapes.

    Inputs: `input_ids` (B, T), `attention_mask` (B, S), `position_ids` (B, T), all int64, and
    `past_key_values.N.key` and `.value` (B, H, P, D). Outputs: `logits` (B, T, V) and `present.N.key` and `.value`
    (B, H, S, D). The mask is 0 for padding, which no other token attends to.
    """
    from onnx import helper

    graph = _Graph()
    graph.constant("heads", np.array([0, 0, config.n_head, config.head_dim]))  # 0 keeps the size of the input
    graph.constant("width", np.array([0, 0, config.n_embd]))
    bias = _attention_bias(graph)
    tokens = graph.add("Gather", "wte", "wte.weight", "input_ids")
    positions = graph.add("Gather", "wpe", "wpe.weight", "position_ids")
    x = graph.add("Add", "embeddings", tokens, positions)  # (B, T, C)
    for layer in range(config.n_layer):
        x = _block(graph, config, layer, x, bias)
    _head(graph, config, graph.norm("ln_f", x, config.layer_norm_epsilon))
    return helper.make_graph(graph.nodes, "gpt2", *_interface(config), [*weights, *graph.constants])


def _interface(config: GPT2Config) -> tuple[list[Any], list[Any]]:
    from onnx import TensorProto, helper

    def described(name: str, kind: int, *shape: str | int) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [
        described("input_ids", TensorProto.INT64, _BATCH, _TOKENS),
        described("attention_mask", TensorProto.INT64, _BATCH, _ALL),
        described("position_ids", TensorProto.INT64, _BATCH, _TOKENS),
    ]
    outputs = [described("logits", TensorProto.FLOAT, _BATCH, _TOKENS, config.vocab_size)]
    for layer in range(config.n_layer):
        for kind in ("key", "value"):
            sizes = (_BATCH, config.n_head, _PAST, config.head_dim)
            inputs.append(described(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, *sizes))
            sizes = (_BATCH, config.n_head, _ALL, config.head_dim)
            outputs.append(described(f"present.{layer}.{kind}", TensorProto.FLOAT, *sizes))
    return inputs, outputs


def _attention_bias(graph: _Graph) -> str:
    """Add what is added to the scores, (B, 1, T, S): 0 where a token attends, and the least float32 elsewhere.

    Padding attends to itself, because a softmax over no tokens would be NaN.
    """
    from onnx import TensorProto

    zero, one = graph.constant("zero", np.array(0)), graph.constant("one", np.array(1))
    first, second = graph.constant("axis_0", np.array([0])), graph.constant("axis_1", np.array([1]))
    past, end = (
        graph.add("Squeeze", name, graph.add("Shape", f"{name}.shape", source, start=axis, end=axis + 1), first)
        for name, source, axis in (("n_past", "past_key_values.0.key", 2), ("n_all", "attention_mask", 1))
    )
    slots = graph.add("Range", "slots", zero, end, one)  # (S,)
    own = graph.add("Unsqueeze", "own_slots", graph.add("Range", "new_slots", past, end, one), second)  # (T, 1)
    before = graph.add("LessOrEqual", "before", slots, own)  # (T, S)
    itself = graph.add("Equal", "itself", slots, own)
    token = graph.add("Unsqueeze", "is_token", graph.add("Cast", "mask", "attention_mask", to=TensorProto.BOOL), second)
    attends = graph.add("Or", "attends", graph.add("And", "token_before", token, before), itself)  # (B, T, S)
    nothing = graph.constant("nothing", np.array(0, dtype=np.float32))
    hidden = graph.constant("hidden", np.array(np.finfo(np.float32).min))
    return graph.add("Where", "attention_bias", graph.add("Unsqueeze", "attends_heads", attends, second), nothing, hidden)


def _block(graph: _Graph, config: GPT2Config, layer: int, x: str, bias: str) -> str:
    name = f"h.{layer}"
    normed = graph.norm(f"{name}.ln_1", x, config.layer_norm_epsilon)
    x = graph.add("Add", f"{name}.with_attn", x, _attention(graph, config, layer, normed, bias))
    inner = graph.linear(f"{name}.mlp.c_fc", graph.norm(f"{name}.ln_2", x, config.layer_norm_epsilon))
    outer = graph.linear(f"{name}.mlp.c_proj", _activation(graph, config, f"{name}.mlp.act", inner))
    return graph.add("Add", f"{name}.with_mlp", x, outer)


def _attention(graph: _Graph, config: GPT2Config, layer: int, x: str, bias: str) -> str:
    name = f"h.{layer}.attn"
    scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
    scale /= layer + 1 if config.scale_attn_by_inverse_layer_idx else 1
    parts = graph.split(
        "Split", f"{name}.split", [f"{name}.{part}" for part in "qkv"], graph.linear(f"{name}.c_attn", x),
        axis=2, num_outputs=3,
    )  # fmt: skip
    q, k, v = (
        graph.add("Transpose", f"{y}.heads", graph.add("Reshape", f"{y}.split", y, "heads"), perm=[0, 2, 1, 3])
        for y in parts
    )  # (B, H, T, D) each
    keys = graph.add("Concat", f"present.{layer}.key", f"past_key_values.{layer}.key", k, axis=2)  # (B, H, S, D)
    values = graph.add("Concat", f"present.{layer}.value", f"past_key_values.{layer}.value", v, axis=2)
    factor = graph.constant(f"{name}.scale", np.array(scale, dtype=np.float32))
    scaled = graph.add("Mul", f"{name}.scaled", q, factor)
    columns = graph.add("Transpose", f"{name}.columns", keys, perm=[0, 1, 3, 2])
    scores = graph.add("Add", f"{name}.scores", graph.add("MatMul", f"{name}.products", scaled, columns), bias)
    pattern = graph.add("Softmax", f"{name}.pattern", scores, axis=-1)  # (B, H, T, S)
    mixed = graph.add("MatMul", f"{name}.mixed", pattern, values)
    rows = graph.add("Transpose", f"{name}.rows", mixed, perm=[0, 2, 1, 3])
    return graph.linear(f"{name}.c_proj", graph.add("Reshape", f"{name}.joined", rows, "width"))


def _activation(graph: _Graph, config: GPT2Config, name: str, x: str) -> str:
    if config.activation_function == "relu":
        return graph.add("Relu", name, x)
    return graph.add("Gelu", name, x, approximate="tanh" if config.activation_function in TANH_GELU else "none")


def _head(graph: _Graph, config: GPT2Config, x: str) -> None:
    """Add the logits. Gemm reads the token embedding as it is; MatMul would need a transposed copy of it."""
    flat = graph.add("Reshape", "rows", x, graph.constant("rows.shape", np.array([-1, config.n_embd])))
    products = graph.add("Gemm", "rows.logits", flat, "wte.weight", transB=1)
    size = graph.constant("vocab_size", np.array([config.vocab_size]))
    shape = graph.add("Concat", "logits.shape", graph.add("Shape", "input_ids.shape", "input_ids"), size, axis=0)
    graph.add("Reshape", "logits", products, shape)
