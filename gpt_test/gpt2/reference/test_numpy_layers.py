"""Each pair of forward and backward functions against PyTorch's autograd in float64, and against central differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.reference import numpy_layers as layers

sizes = st.integers(1, 8)
leading = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
seeds = st.integers(0, 999)


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def assert_close(ours: object, theirs: torch.Tensor, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=tolerance)


def against_autograd(forward: Callable, backward: Callable, torch_forward: Callable, inputs: list[np.ndarray]) -> None:
    """The result and the gradients of all inputs, for a random dL/d(result), equal PyTorch's. No argument changes."""
    copies = [x.copy() for x in inputs]
    out, saved = forward(*inputs)
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    theirs = torch_forward(*tensors)
    assert_close(out, theirs)
    d_out = np.random.default_rng(1).standard_normal(out.shape)
    theirs.backward(torch.tensor(d_out))
    for _ in range(2):  # twice, because a backward function must not change what was saved
        gradients = backward(d_out.copy(), saved)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        for gradient, tensor in zip(gradients, tensors, strict=True):
            assert_close(gradient, tensor.grad)
    for x, copy in zip(inputs, copies, strict=True):
        assert (x == copy).all()


def by_central_differences(forward: Callable, backward: Callable, inputs: list[np.ndarray]) -> None:
    """Each gradient equals (L(x + h) - L(x - h)) / 2h, for every number of every input. Independent of PyTorch."""
    out, saved = forward(*inputs)
    d_out = np.random.default_rng(2).standard_normal(out.shape)
    gradients = backward(d_out, saved)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    for gradient, x in zip(gradients, inputs, strict=True):
        for place in np.ndindex(x.shape):
            here, h = x[place], 1e-5
            x[place] = here + h
            above = (forward(*inputs)[0] * d_out).sum()
            x[place] = here - h
            below = (forward(*inputs)[0] * d_out).sum()
            x[place] = here
            assert abs((above - below) / (2 * h) - gradient[place]) < 1e-7


def layer_norm(x, weight, bias):
    return layers.layer_norm_forward(x, weight, bias, 1e-2)


def attention(q, k, v):
    return layers.causal_attention_forward(q, k, v, 0.4)


def torch_attention(q, k, v):
    T, S = q.shape[-2], k.shape[-2]
    visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=0.4)


@given(leading, sizes, sizes, seeds)
def test_linear(lead: tuple[int, ...], n_in: int, n_out: int, seed: int) -> None:
    inputs = arrays(seed, (*lead, n_in), (n_in, n_out), (n_out,))
    against_autograd(layers.linear_forward, layers.linear_backward, lambda x, W, b: x @ W + b, inputs)


@given(leading, sizes, seeds)
def test_layer_norm(lead: tuple[int, ...], C: int, seed: int) -> None:
    inputs = arrays(seed, (*lead, C), (C,), (C,))
    against_autograd(layer_norm, layers.layer_norm_backward, lambda x, w, b: F.layer_norm(x, (C,), w, b, 1e-2), inputs)


@pytest.mark.parametrize(
    ("name", "torch_forward"),
    [("gelu_new", lambda x: F.gelu(x, approximate="tanh")), ("gelu", F.gelu), ("relu", F.relu)],
)
@given(lead=leading, n=sizes, seed=seeds)
@settings(max_examples=30)
def test_activations(name: str, torch_forward: Callable, lead: tuple[int, ...], n: int, seed: int) -> None:
    (x,) = arrays(seed, (*lead, n))
    against_autograd(*layers.ACTIVATIONS[name], torch_forward, [3 * x])


def test_gelu_of_several_parts_and_of_a_transposed_array() -> None:
    (x,) = arrays(0, (300, 250))
    against_autograd(*layers.ACTIVATIONS["gelu_new"], lambda x: F.gelu(x, approximate="tanh"), [x.T])


@given(leading, sizes, seeds)
def test_softmax(lead: tuple[int, ...], n: int, seed: int) -> None:
    (x,) = arrays(seed, (*lead, n))
    against_autograd(layers.softmax_forward, layers.softmax_backward, lambda x: x.softmax(-1), [30 * x])


@given(st.lists(sizes, min_size=0, max_size=2).map(tuple), sizes, st.integers(0, 4), sizes, seeds)
def test_causal_attention(lead: tuple[int, ...], T: int, past: int, D: int, seed: int) -> None:
    inputs = arrays(seed, (*lead, T, D), (*lead, past + T, D), (*lead, past + T, D))
    against_autograd(attention, layers.causal_attention_backward, torch_attention, inputs)


@given(leading, sizes, sizes, seeds)
def test_embedding_sums_the_gradients_of_repeated_ids(lead: tuple[int, ...], V: int, C: int, seed: int) -> None:
    (table,) = arrays(seed, (V, C))
    ids = np.random.default_rng(seed).integers(0, V, lead)
    against_autograd(
        lambda table: layers.embedding_forward(table, ids),
        layers.embedding_backward,
        lambda table: F.embedding(torch.tensor(ids), table),
        [table],
    )


@given(leading, sizes, sizes, seeds)
def test_tied_head(lead: tuple[int, ...], V: int, C: int, seed: int) -> None:
    inputs = arrays(seed, (*lead, C), (V, C))
    against_autograd(layers.tied_head_forward, layers.tied_head_backward, F.linear, inputs)


@given(sizes, sizes, sizes, seeds)
def test_cross_entropy_over_3d_logits(B: int, T: int, V: int, seed: int) -> None:
    """The sizes include B = T and T = V."""
    (logits,) = arrays(seed, (B, T, V))
    targets = np.random.default_rng(seed).integers(0, V, (B, T))
    loss, saved = layers.cross_entropy_forward(20 * logits, targets)
    tensor = torch.tensor(20 * logits, requires_grad=True)
    theirs = F.cross_entropy(tensor.flatten(0, 1), torch.tensor(targets).flatten())
    (3 * theirs).backward()
    assert_close(loss, theirs)
    for _ in range(2):
        assert_close(layers.cross_entropy_backward(saved, 3.0), tensor.grad)


def test_heads_split_and_merge() -> None:
    (x,) = arrays(0, (2, 5, 6))
    heads = layers.split_heads(x, 3)
    assert heads.shape == (2, 3, 5, 2) and (heads[1, 2, 4] == x[1, 4, 4:]).all()
    assert (layers.merge_heads(heads) == x).all()


@pytest.mark.parametrize(
    ("forward", "backward", "shapes"),
    [
        (layers.linear_forward, layers.linear_backward, [(2, 3, 4), (4, 5), (5,)]),
        (layer_norm, layers.layer_norm_backward, [(2, 3, 5), (5,), (5,)]),
        (layers.gelu_forward, layers.gelu_backward, [(3, 4)]),
        (layers.exact_gelu_forward, layers.exact_gelu_backward, [(3, 4)]),
        (layers.softmax_forward, layers.softmax_backward, [(3, 4)]),
        (attention, layers.causal_attention_backward, [(2, 3, 4), (2, 5, 4), (2, 5, 4)]),
        (layers.tied_head_forward, layers.tied_head_backward, [(2, 3, 4), (5, 4)]),
        (
            lambda q, k, v: layers.causal_attention_forward(q, k, v, 0.4, 0.5, np.random.default_rng(3)),
            layers.causal_attention_backward,
            [(2, 4, 3), (2, 4, 3), (2, 4, 3)],
        ),
        (
            lambda x: layers.dropout_forward(x, 0.5, np.random.default_rng(3)),
            layers.dropout_backward,
            [(3, 4)],
        ),
    ],
)
def test_gradients_by_central_differences(forward: Callable, backward: Callable, shapes: list[tuple[int, ...]]) -> None:
    by_central_differences(forward, backward, arrays(5, *shapes))


def test_dropout() -> None:
    """A share p becomes 0, the rest is divided by 1 - p. No generator: no change. One seed: one mask in both dtypes."""
    x = np.ones((200, 200))
    dropped, saved = layers.dropout_forward(x, 0.3, np.random.default_rng(0))
    assert set(np.unique(dropped)) == {0.0, 1 / 0.7}
    assert abs((dropped == 0).mean() - 0.3) < 0.01
    assert (layers.dropout_backward(2 * x, saved) == 2 * dropped).all()
    narrow, _ = layers.dropout_forward(x.astype(np.float32), 0.3, np.random.default_rng(0))
    assert narrow.dtype == np.float32 and ((narrow == 0) == (dropped == 0)).all()
    for p, rng in ((0.3, None), (0.0, np.random.default_rng(0))):
        kept, saved = layers.dropout_forward(x, p, rng)
        assert (kept == 1).all() and (layers.dropout_backward(x, saved) == 1).all()


def test_attention_with_dropout_uses_one_mask_forward_and_backward() -> None:
    """Attention with dropout equals autograd with the same mask."""
    q, k, v = arrays(0, (2, 4, 3), (2, 4, 3), (2, 4, 3))
    out, saved = layers.causal_attention_forward(q, k, v, 0.4, 0.5, np.random.default_rng(7))
    mask = torch.tensor((np.random.default_rng(7).random((2, 4, 4), dtype=np.float32) >= 0.5) / 0.5)
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    scores = (tensors[0] @ tensors[1].mT * 0.4).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)
    theirs = (scores.softmax(-1) * mask) @ tensors[2]
    assert_close(out, theirs)
    (d_out,) = arrays(1, out.shape)
    theirs.backward(torch.tensor(d_out))
    for gradient, tensor in zip(layers.causal_attention_backward(d_out, saved), tensors, strict=True):
        assert_close(gradient, tensor.grad)
