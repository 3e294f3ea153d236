"""Dropout has the requested rate, keeps the mean, and depends on the seed only."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gpt2 import GPT2
from gpt2.dropout import attention_with_dropout, dropout
from gpt_config import GPT2Config


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_the_rate_and_the_mean_are_right(p: float) -> None:
    torch.manual_seed(0)
    n = 1_000_003  # not a multiple of four
    y = dropout(torch.ones(n), p, training=True)
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=2e-4)
    assert y.mean().item() == pytest.approx(1, abs=5 * math.sqrt(p / (1 - p) / n))
    places = (y == 0).double()
    neighbours = torch.corrcoef(torch.stack([places[:-1], places[1:]]))[0, 1].item()
    assert abs(neighbours) < 5 / math.sqrt(n)


def test_it_depends_on_the_seed_and_on_earlier_draws() -> None:
    x = torch.randn(3, 50)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([dropout(x, 0.5, training=True), dropout(x, 0.5, training=True)])
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1]) and not torch.equal(draws[0][0], draws[2][0])


def test_it_does_nothing_in_eval_mode_or_at_rate_zero() -> None:
    x = torch.randn(5)
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0, training=True) is x
    assert dropout(x, 1e-9, training=True) is x  # 1e-9 rounds to 0 in 16 bits


def test_gradients_pass_where_values_are_kept() -> None:
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.25, training=True)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0).double() * (4 / 3))


@pytest.mark.parametrize("with_mask", [False, True])
def test_attention_without_drops_is_torchs_own(with_mask: bool) -> None:
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64).unbind()
    mask = (torch.rand(2, 1, 7, 7) < 0.6) | torch.eye(7, dtype=torch.bool) if with_mask else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=0.3)
    found = attention_with_dropout(q, k, v, mask, 0.0, 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_attention_drops_weights_not_outputs() -> None:
    torch.manual_seed(0)
    q, k = torch.zeros(2, 1, 1, 400, 2).unbind()
    y = attention_with_dropout(q, k, torch.ones(1, 1, 400, 2), torch.ones(400, 400, dtype=torch.bool), 0.5, 1.0)
    assert torch.equal(y[..., 0], y[..., 1]), "a dropped weight drops the whole value vector"
    assert y.mean().item() == pytest.approx(1, abs=0.01) and y.std().item() == pytest.approx(0.05, rel=0.2)


def test_each_rate_of_the_config_drops_activations(small_config: GPT2Config) -> None:
    ids = torch.arange(20)[None]
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        rates = {**dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0), name: 0.5}
        model = GPT2(GPT2Config(vocab_size=20, n_positions=20, n_embd=8, n_layer=2, n_head=2, **rates))
        expected = model.eval()(ids)
        assert torch.equal(expected, model(ids))
        assert not torch.allclose(expected, model.train()(ids)), name


def test_the_rate_can_be_set_afterwards(small_config: GPT2Config) -> None:
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.5)
    sizes = {"vocab_size": 20, "n_positions": 20, "n_embd": 8, "n_layer": 2, "n_head": 2}
    made, changed = GPT2(GPT2Config(**sizes, **rates)), GPT2(GPT2Config(**sizes))
    changed.set_dropout(0.5)
    changed.load_state_dict(made.state_dict())
    assert changed.config == made.config
    outputs = []
    for model in (made, changed):
        torch.manual_seed(0)
        outputs.append(model.train()(torch.arange(20)[None]))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], made.eval()(torch.arange(20)[None]))
