"""Every check fails if its subject is broken: one sign or one transposition is changed in the source of one function."""

# ruff: noqa: E501  tables are easier to compare with one mutant per line
from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gpt2.model as torch_model
from gpt2.fast import plan as decode_plan
from gpt2.reference import (
    numpy_generation,
    numpy_gpt2,
    numpy_layers,
    numpy_model,
    numpy_optimizers,
    python_gpt2,
    python_layers,
)
from gpt2.training.loss import LanguageModelLoss
from gpt2.verification.checks import Check, Status
from gpt2.verification.components import component_checks
from gpt2.verification.optimizers import optimizer_checks
from gpt2.verification.whole import model_checks, random_model

# (the part that must fail, its engine, the module or class of the function, its name, the code to replace, its replacement)
COMPONENT_MUTANTS = [
    ("matrix product, forward", "Python", python_layers, "matmul", "columns = transpose(b)", "columns = b"),
    ("transpose, forward", "Python", python_layers, "transpose", "zip(*a, strict=True)", "a"),
    ("residual addition, forward", "Python", python_layers, "add", "x + y", "x - y"),
    ("embedding, forward", "Python", python_layers, "embedding", "table[token]", "table[-token]"),
    ("embedding, forward", "NumPy", numpy_layers, "embedding_forward", "table[ids],", "table[-ids],"),
    ("embedding, backward", "NumPy", numpy_layers, "embedding_backward", "= np.add.", "= -np.add."),
    ("layer norm, forward", "Python", python_layers, "layer_norm", "value - mean", "value + mean"),
    ("layer norm, forward", "Python", python_layers, "layer_norm", "+ epsilon", "- epsilon"),
    ("layer norm, forward", "NumPy", numpy_layers, "layer_norm_forward", "+ epsilon", "- epsilon"),
    ("layer norm, forward", "NumPy", numpy_layers, "layer_norm_forward", "out += bias", "out -= bias"),
    ("layer norm, backward", "NumPy", numpy_layers, "layer_norm_backward", "d_x -= normed", "d_x += normed"),
    ("layer norm, backward", "NumPy", numpy_layers, "layer_norm_backward", "d_x -= d_x.mean", "d_x += d_x.mean"),
    ("linear, forward", "Python", python_layers, "linear", "dot(row, weights) + b", "dot(row, weights) - b"),
    ("linear, forward", "NumPy", numpy_layers, "linear_forward", "out += bias", "out -= bias"),
    ("linear, forward", "PyTorch", torch_model.Conv1D, "forward", "self.weight.t(), self.bias", "self.weight.t(), -self.bias"),
    ("linear, backward", "NumPy", numpy_layers, "linear_backward", "flat.T @ d_flat", "(d_flat.T @ flat).reshape(flat.shape[1], -1)"),
    ("linear, backward", "PyTorch", torch_model.Conv1D, "forward", "self.weight.t(), self", "-self.weight.t(), self"),
    ("GELU, forward", "Python", python_layers, "gelu", "x + 0.044715", "x - 0.044715"),
    ("GELU, forward", "NumPy", numpy_layers, "gelu_forward", "t += _A", "t -= _A"),
    ("GELU, backward", "NumPy", numpy_layers, "gelu_backward", "1 - t", "1 + t"),
    ("exact GELU, forward", "Python", python_layers, "exact_gelu", "1 + math", "1 - math"),
    ("exact GELU, forward", "NumPy", numpy_layers, "exact_gelu_forward", "1 + erf", "1 - erf"),
    ("exact GELU, backward", "NumPy", numpy_layers, "exact_gelu_backward", "phi + x", "phi - x"),
    ("ReLU, forward", "Python", python_layers, "relu", "max(x", "max(-x"),
    ("ReLU, forward", "NumPy", numpy_layers, "relu_forward", "maximum(x", "maximum(-x"),
    ("ReLU, backward", "NumPy", numpy_layers, "relu_backward", "> 0", "< 0"),
    ("dropout, forward", "NumPy", numpy_layers, "dropout_forward", "1 / (1 - p)", "1 / (1 + p)"),
    ("dropout, backward", "NumPy", numpy_layers, "dropout_backward", "else d_out * mask", "else d_out"),
    ("softmax, forward", "Python", python_layers, "softmax", "value - largest", "largest - value"),
    ("softmax, forward", "NumPy", numpy_layers, "softmax_forward", "y = x - x.max(-1, keepdims=True)", "y = x.max(-1, keepdims=True) - x"),
    ("softmax, backward", "NumPy", numpy_layers, "softmax_backward", "d_out - _dot", "d_out + _dot"),
    ("masked softmax, forward", "Python", python_layers, "masked_softmax", "[:n_visible]", "[-n_visible:]"),
    ("probabilities at a temperature, forward", "Python", python_gpt2, "logits_to_probs", "/ temperature", "* temperature"),
    ("causal attention, forward", "Python", python_gpt2, "attention_head", "* scale", "* -scale"),
    ("causal attention, forward", "NumPy", numpy_layers, "causal_attention_forward", "k=S - T + 1", "k=S - T + 2"),
    ("causal attention, backward", "NumPy", numpy_layers, "causal_attention_backward", "d_q *= scale", "d_q *= -scale"),
    ("causal attention, backward", "NumPy", numpy_layers, "causal_attention_backward", "d_scores.swapaxes(-1, -2) @", "d_scores @"),
    ("causal attention, backward", "NumPy", numpy_layers, "causal_attention_backward", "dropped.swapaxes(-1, -2) @", "dropped @"),
    ("multi-head attention, forward", "Python", python_gpt2, "multi_head_attention", "queries, keys, values = (", "keys, queries, values = ("),
    ("multi-head attention, forward", "NumPy", numpy_gpt2, "attention_forward", "q, k, v = (", "k, q, v = ("),
    ("multi-head attention, forward", "PyTorch", torch_model.CausalSelfAttention, "forward", "y.transpose(1, 2)", "y"),
    ("multi-head attention, backward", "NumPy", numpy_gpt2, "attention_backward", '"attn.c_attn.bias": d', '"attn.c_attn.bias": -d'),
    ("multi-head attention, backward", "PyTorch", torch_model.CausalSelfAttention, "forward", "y.transpose(1, 2)", "y"),
    ("MLP, forward", "Python", python_gpt2, "mlp", "activation(value)", "-activation(value)"),
    ("MLP, forward", "NumPy", numpy_gpt2, "mlp_forward", "forward(wide)", "forward(-wide)"),
    ("MLP, forward", "PyTorch", torch_model.MLP, "forward", "self.activation(", "-self.activation("),
    ("MLP, backward", "NumPy", numpy_gpt2, "mlp_backward", '"mlp.c_fc.bias": d', '"mlp.c_fc.bias": -d'),
    ("MLP, backward", "PyTorch", torch_model.MLP, "forward", "self.activation(", "-self.activation("),
    ("block, forward", "Python", python_gpt2, "block", "config, layer, cache))", "config, layer, cache))[::-1]"),
    ("block, forward", "NumPy", numpy_gpt2, "block_forward", "x = x + attended", "x = x - attended"),
    ("block, forward", "PyTorch", torch_model.Block, "forward", "x + self.mlp", "x - self.mlp"),
    ("block, backward", "NumPy", numpy_gpt2, "block_backward", "d_x += d_out", "d_x -= d_out"),
    ("block, backward", "PyTorch", torch_model.Block, "forward", "x + self.mlp", "x - self.mlp"),
    ("tied head, forward", "Python", python_gpt2, "tied_head", "dot(hidden, row)", "-dot(hidden, row)"),
    ("tied head, forward", "NumPy", numpy_layers, "tied_head_forward", "(flat @", "(-flat @"),
    ("tied head, backward", "NumPy", numpy_layers, "tied_head_backward", "d_flat.T @ flat", "(flat.T @ d_flat).reshape(d_flat.shape[1], -1)"),
    ("cross-entropy, forward", "NumPy", numpy_layers, "cross_entropy_forward", "- chosen", "+ chosen"),
    ("cross-entropy, backward", "NumPy", numpy_layers, "cross_entropy_backward", "-= d_loss", "+= d_loss"),
]  # fmt: skip
OPTIMIZER_MUTANTS = [
    ("SGD, 5 steps", numpy_optimizers, "sgd_step", "parameter -= learning_rate * gradient\n", "parameter += learning_rate * gradient\n"),
    ("SGD with Nesterov momentum, 5 steps", numpy_optimizers, "sgd_step", "gradient + momentum", "gradient - momentum"),
    ("Adam, 5 steps", numpy_optimizers, "adam_step", "1 - beta_2 ** state", "1 + beta_2 ** state"),
    ("AdamW, 5 steps", numpy_optimizers, "adamw_step", "1 - learning_rate", "1 + learning_rate"),
    ("gradient clipping", numpy_optimizers, "clip_gradients", "gradient *= scale", "gradient *= -scale"),
    ("warm-up and cosine", numpy_optimizers, "warmup_cosine", "1 + math.cos", "1 - math.cos"),
]  # fmt: skip
# Faults in functions that only the whole model uses: in the subject, or in PyTorch where it is compared with transformers.
MODEL_MUTANTS = [
    ("logits", "Python", "PyTorch", python_gpt2, "hidden_states", "range(past, past", "range(past + 1, past + 1"),
    ("logits", "NumPy", "PyTorch", numpy_model, "gpt2_forward", "tokens + positions", "tokens - positions"),
    ("logits", "PyTorch", "transformers", torch_model.GPT2, "embed", "+ self.wpe", "- self.wpe"),
    ("activations", "NumPy", "PyTorch", numpy_gpt2, "block_forward", '"hook_resid_mid", x', '"hook_resid_mid", attended'),
    ("activations", "NumPy", "PyTorch", numpy_gpt2, "attention_forward", "(y @ by_head).swapaxes(1, 2)", "(y @ by_head)"),
    ("loss and gradients", "NumPy", "PyTorch", numpy_gpt2, "gpt2_backward", "d_wte += embedding", "d_wte -= embedding"),
    ("loss and gradients", "NumPy", "central differences", numpy_gpt2, "gpt2_backward", "d_wte += embedding", "d_wte -= embedding"),
    ("loss and gradients", "PyTorch", "transformers", LanguageModelLoss, "forward", "hidden.flatten", "-hidden.flatten"),
    ("logits with a KV cache", "PyTorch", "NumPy", torch_model, "visible_slots", "<= slots[past:, None]", ">= slots[past:, None]"),
    ("logits with a KV cache", "NumPy", "PyTorch", numpy_model, "gpt2_forward", "at = np.arange(past, past +", "at = np.arange(0,"),
    ("logits with a KV cache", "Python", "PyTorch", python_gpt2, "hidden_states", "range(past, past + len(ids))", "range(len(ids))"),
    ("greedy ids", "NumPy", "PyTorch", numpy_generation, "next_logits", "return ", "return -"),
    ("greedy ids", "Python", "PyTorch", python_gpt2, "greedy", "max(", "min("),
    ("greedy ids", "transformers", "PyTorch", decode_plan.DecodePlan, "greedy_tokens", "[[token]]", "[[0]]"),
    ("loss over 20 training steps", "NumPy", "PyTorch", numpy_gpt2, "gpt2_backward", "d_wte += embedding", "d_wte -= embedding"),
    ("loss over 20 training steps", "transformers", "PyTorch", torch_model.MLP, "forward", "self.activation(", "-self.activation("),
]  # fmt: skip


def mutate(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, old: str, new: str) -> None:
    """Replace `old` by `new` in the function `name` of a module or class."""
    function = getattr(place, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) >= 1, f"{old!r} is not in {name}: the mutant must be changed with the code"
    namespace: dict[str, Any] = {}
    exec(compile(source.replace(old, new), f"mutant of {name}", "exec"), function.__globals__, namespace)
    monkeypatch.setattr(place, name, namespace[name])


def statuses(checks: Iterator[Check], part: str, subject: str, oracle: str | None = None) -> list[Status]:
    """The results of the checks of `part` with the engine `subject`. If `oracle` is None, `subject` may also be the oracle."""
    chosen = [
        check
        for check in checks
        if check.part == part
        and (
            subject in (check.subject, check.oracle)
            if oracle is None
            else (check.subject, check.oracle) == (subject, oracle)
        )
    ]
    return [check.run().status for check in chosen]


def expect(run: Callable[[], list[Status]], status: Status) -> None:
    found = run()
    assert found and set(found) == {status}, found


@pytest.mark.parametrize(("part", "engine", "place", "name", "old", "new"), COMPONENT_MUTANTS)
def test_a_broken_component_fails_its_checks(
    monkeypatch: pytest.MonkeyPatch, part: str, engine: str, place: Any, name: str, old: str, new: str
) -> None:
    expect(lambda: statuses(component_checks(), part, engine), Status.PASS)
    mutate(monkeypatch, place, name, old, new)
    expect(lambda: statuses(component_checks(), part, engine), Status.FAIL)


def test_every_component_has_a_mutant() -> None:
    assert {(c.part, c.subject) for c in component_checks()} <= {mutant[:2] for mutant in COMPONENT_MUTANTS}
    assert {check.part for check in optimizer_checks()} == {mutant[0] for mutant in OPTIMIZER_MUTANTS}


@pytest.mark.parametrize(("part", "place", "name", "old", "new"), OPTIMIZER_MUTANTS)
def test_a_broken_optimizer_fails_its_checks(
    monkeypatch: pytest.MonkeyPatch, part: str, place: Any, name: str, old: str, new: str
) -> None:
    expect(lambda: statuses(optimizer_checks(), part, "NumPy"), Status.PASS)
    mutate(monkeypatch, place, name, old, new)
    expect(lambda: statuses(optimizer_checks(), part, "NumPy"), Status.FAIL)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with random_model() as path:
        yield path


def test_every_check_of_the_whole_model_has_a_mutant(folder: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[test]')")
    assert {(c.part, c.subject, c.oracle) for c in model_checks(folder)} == {mutant[:3] for mutant in MODEL_MUTANTS}


@pytest.mark.parametrize(("part", "engine", "oracle", "place", "name", "old", "new"), MODEL_MUTANTS)
def test_a_broken_model_fails_its_checks(
    monkeypatch: pytest.MonkeyPatch, folder: Path, part: str, engine: str, oracle: str, place: Any, name: str, old: str, new: str
) -> None:  # fmt: skip
    if "transformers" in (engine, oracle):
        pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[test]')")
    expect(lambda: statuses(model_checks(folder), part, engine, oracle), Status.PASS)
    mutate(monkeypatch, place, name, old, new)
    expect(lambda: statuses(model_checks(folder), part, engine, oracle), Status.FAIL)
