"""Separate projections against the model's attention and converted exactly; sinusoids against their closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2.reference import classroom
from gpt_config import GPT2Config, InputError
from gpt_test.conftest import random_model


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_separate_projections_are_the_fused_one(n_head: int, head_dim: int, T: int, seed: int) -> None:
    """The conversion is exact in both directions. Attention with separate projections equals the model's, also if T = C."""
    config = GPT2Config(vocab_size=5, n_positions=9, n_embd=n_head * head_dim, n_layer=1, n_head=n_head)
    attn = random_model(config, seed, torch.float64).h[0].attn
    weight, bias, c_proj_weight, c_proj_bias = (parameter.detach().numpy() for parameter in attn.parameters())
    separate = classroom.separate_projections(weight, bias)
    fused = classroom.fused_projection(separate)
    assert fused[0].tobytes() == weight.tobytes() and fused[1].tobytes() == bias.tobytes()
    for before, after in zip(separate, classroom.separate_projections(*fused), strict=True):
        assert before.tobytes() == after.tobytes()
    x = np.random.default_rng(seed).standard_normal((T, config.n_embd))
    ours = classroom.separate_attention(x, separate, c_proj_weight, c_proj_bias, n_head)
    theirs = attn(torch.tensor(x)[None], None, None)[0].detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_three_linear_layers_of_pytorch_become_c_attn() -> None:
    """The conversion from a model that has an nn.Linear for each of Q, K and V."""
    x = torch.randn(4, 6, dtype=torch.float64)
    linears = [torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(3)]
    numbers = [array.detach().numpy() for linear in linears for array in (linear.weight.t(), linear.bias)]
    weight, bias = classroom.fused_projection(classroom.SeparateProjections(*numbers))
    joined = torch.cat([linear(x) for linear in linears], dim=-1).detach().numpy()
    np.testing.assert_allclose(x.numpy() @ weight + bias, joined, rtol=0, atol=1e-12)


def test_a_transposed_c_attn_is_refused() -> None:
    with pytest.raises(InputError, match="transpose"):
        classroom.separate_projections(np.zeros((18, 6)), np.zeros(18))


def test_sinusoids() -> None:
    table = classroom.sinusoidal_positions(50, 10)
    for position in range(50):
        for pair in range(5):
            angle = position / 10000 ** (2 * pair / 10)
            assert abs(table[position, 2 * pair] - math.sin(angle)) < 1e-12
            assert abs(table[position, 2 * pair + 1] - math.cos(angle)) < 1e-12
    # Moving on by 7 tokens is the same rotation at every position.
    angles = 7 * 10000.0 ** (-np.arange(0, 10, 2) / 10)
    sine, cosine = table[:-7, 0::2], table[:-7, 1::2]
    np.testing.assert_allclose(table[7:, 0::2], sine * np.cos(angles) + cosine * np.sin(angles), rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="n_embd=5 is odd"):
        classroom.sinusoidal_positions(3, 5)
