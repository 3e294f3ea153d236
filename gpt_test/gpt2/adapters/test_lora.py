"""LoRA: a new adapter changes nothing, only adapters learn, and a merged model computes the same as one with adapters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.adapters.lora import (
    LoRAConv1D,
    add_lora,
    lora_modules,
    lora_parameters,
    merge_lora,
    merged_parameters,
    named_lora_parameters,
)
from gpt2.fast.plan import DecodePlan
from gpt2.model import Conv1D
from gpt2.pretrained import load_model
from gpt2.training.checkpoint import gather_state, restore_state
from gpt2.training.loss import LanguageModelLoss
from gpt2.training.optimizer import make_optimizer
from gpt_config import ConfigError, GPT2Config, LoRAConfig, TrainingConfig
from gpt_test.conftest import random_model

IDS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 0, 6, 2]])


def with_adapters(config: GPT2Config, lora: LoRAConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> GPT2:
    """A random model whose adapters are random and far from zero."""
    model = random_model(config, dtype=dtype)
    add_lora(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_a_new_adapter_changes_nothing(small_config: GPT2Config) -> None:
    model = random_model(small_config)
    before, names = model(IDS), dict(model.named_parameters())
    add_lora(model, LoRAConfig())
    assert torch.equal(model(IDS), before)
    adapters = dict(named_lora_parameters(model))
    assert len(adapters) == 2 * 4 * small_config.n_layer
    # The model's own parameters keep their names, and are the same objects.
    assert {name: id(p) for name, p in model.named_parameters() if name not in adapters} == {
        name: id(p) for name, p in names.items()
    }
    for name, parameter in adapters.items():
        bound = parameter.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5)
        assert torch.all(parameter == 0) if name.endswith("B") else 0.8 * bound < parameter.abs().max() <= bound


def test_the_adapter_is_that_of_the_paper() -> None:
    """h = W0 x + (alpha / r) B A x, section 4.1."""
    torch.manual_seed(0)
    base = Conv1D(5, 7).double()
    torch.nn.init.normal_(base.weight)
    layer = LoRAConv1D(base, LoRAConfig(rank=3, alpha=4.5))
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, dtype=torch.float64)
    expected = base.weight.t() @ x + base.bias + 1.5 * layer.lora_B @ (layer.lora_A @ x)
    torch.testing.assert_close(layer(x), expected, atol=1e-13, rtol=0)
    assert layer.lora_A.shape == (3, 5) and layer.lora_B.shape == (7, 3)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


@given(
    rank=st.integers(1, 9),
    alpha=st.floats(0.1, 64),
    n_head=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    n_layer=st.integers(1, 3),
    n_inner=st.one_of(st.none(), st.integers(1, 20)),
    use_rslora=st.booleans(),
    targets=st.one_of(
        st.sets(st.sampled_from(["c_attn", "c_proj", "c_fc", "attn.c_proj", "mlp.c_fc", "h.0.mlp.c_proj"]), min_size=1),
        st.sampled_from([r".*c_fc", r"transformer\.h\.0\.attn\..*"]),
    ),
)
def test_merged_and_with_adapters_are_equal(
    rank, alpha, n_head, head_dim, n_layer, n_inner, use_rslora, targets
) -> None:  # fmt: skip
    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=n_head * head_dim, n_head=n_head, n_layer=n_layer, n_inner=n_inner
    )
    targets = targets if isinstance(targets, str) else tuple(sorted(targets))
    lora = LoRAConfig(rank=rank, alpha=alpha, target_modules=targets, use_rslora=use_rslora)
    model = with_adapters(config, lora)
    plain = random_model(config, dtype=torch.float64)
    expected = model(IDS)
    parameters = merged_parameters(model)
    n_adapters = len(list(lora_modules(model)))
    merge_lora(model)
    torch.testing.assert_close(model(IDS), expected, atol=1e-12, rtol=1e-12)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert parameters.keys() == dict(plain.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(parameters[name], parameter) for name, parameter in model.named_parameters())
    changed = [
        name for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True) if not torch.equal(p, q)
    ]
    assert len(changed) == n_adapters and all(name.endswith(".weight") for name in changed)


def test_generation_is_the_same_before_and_after_the_merge(small_config: GPT2Config) -> None:
    model = with_adapters(small_config, LoRAConfig(rank=3, dropout=0.5))
    assert not DecodePlan.fits(model)
    greedy = model.generate(IDS, max_new_tokens=12)
    sampled = model.generate(IDS, max_new_tokens=12, do_sample=True, seed=3, use_cache=False)
    assert not torch.equal(greedy, random_model(small_config, dtype=torch.float64).generate(IDS, max_new_tokens=12))
    merge_lora(model)
    assert DecodePlan.fits(model) and not any(module.training for module in model.modules())
    assert torch.equal(model.generate(IDS, max_new_tokens=12), greedy)
    assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=True, seed=3, use_cache=False), sampled)


def loss_of(model: GPT2) -> torch.Tensor:
    return F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())


def test_only_adapters_get_gradients_and_learn(small_config: GPT2Config) -> None:
    model = with_adapters(
        small_config, LoRAConfig(target_modules=("c_attn", "mlp.c_proj"))
    )  # no dropout, so the losses can be compared
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loss = loss_of(model)
    loss.backward()
    adapters = dict(named_lora_parameters(model))
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == adapters.keys()
    make_optimizer(model, TrainingConfig(learning_rate=1e-2)).step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == adapters.keys() and loss_of(model) < loss


def test_dropout_applies_to_the_adapters_input_in_training_only() -> None:
    torch.manual_seed(0)
    base = Conv1D(64, 3)
    torch.nn.init.normal_(base.weight)
    layer = LoRAConv1D(base, LoRAConfig(rank=2, dropout=0.5))
    torch.nn.init.normal_(layer.lora_B)
    x = torch.ones(400, 64)
    full = layer.eval()(x)
    noisy = layer.train()(x)
    assert torch.equal(full[0], full[1]) and not torch.equal(noisy[0], noisy[1])
    torch.testing.assert_close((noisy - base(x)).mean(0), (full - base(x))[0], atol=0.3, rtol=0)


def test_all_parameters_of_a_merged_model_can_learn(small_config: GPT2Config) -> None:
    model = with_adapters(small_config, LoRAConfig()).train()
    merge_lora(model)
    assert all(parameter.requires_grad for parameter in model.parameters()) and all(m.training for m in model.modules())
    loss_of(model).backward()
    add_lora(model, LoRAConfig())  # new adapters can be added
    frozen = random_model(small_config).requires_grad_(False)
    merge_lora(frozen)  # nothing to merge, nothing changed
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_is_rounded_once(dtype: torch.dtype, small_config: GPT2Config) -> None:
    model = with_adapters(small_config, LoRAConfig(rank=3), dtype)
    exact = copy.deepcopy(model).double()
    merge_lora(exact)
    merge_lora(model)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        # Near the midpoint of two 16-bit numbers, float32 and float64 may round differently: for one weight in thousands.
        assert (p != q.to(dtype)).float().mean() < 0.01, name


@pytest.mark.parametrize(
    "targets", [("c_attn", "q_proj"), ("attn",), ("wte",), "c_attn", r".*lm_head", ("h.7.attn.c_attn",)]
)
def test_a_target_that_matches_nothing_is_named(targets, small_config: GPT2Config) -> None:
    model = random_model(small_config)
    with pytest.raises(ConfigError, match="matches no layer of GPT-2, which has c_attn, c_proj and c_fc"):
        add_lora(model, LoRAConfig(target_modules=targets))
    assert all(parameter.requires_grad for parameter in model.parameters()) and not list(lora_modules(model))


def test_adapters_are_added_once(small_config: GPT2Config) -> None:
    model = random_model(small_config)
    add_lora(model, LoRAConfig(target_modules=("c_attn",)))
    with pytest.raises(ConfigError, match="already has adapters"):
        add_lora(model, LoRAConfig(target_modules=("c_fc",)))


def test_training_continues_from_a_checkpoint(small_config: GPT2Config) -> None:
    config = TrainingConfig(learning_rate=1e-2)

    def start(seed: int) -> tuple[LanguageModelLoss, torch.optim.Optimizer]:
        loss = LanguageModelLoss(with_adapters(small_config, LoRAConfig(), torch.float32, seed).train())
        return loss, make_optimizer(loss, config)

    def step(loss: LanguageModelLoss, optimizer: torch.optim.Optimizer) -> float:
        torch.manual_seed(7)  # dropout
        value = loss(IDS[:, :-1], IDS[:, 1:])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    loss, optimizer = start(0)
    step(loss, optimizer)
    tensors = {name: tensor.clone() for name, tensor in gather_state(loss, optimizer).items()}
    assert "model.model.h.0.attn.c_attn.weight" in tensors and "model.model.h.0.attn.c_attn.lora_A" in tensors
    moments = {name for name in tensors if name.startswith("optimizer.")}
    assert len(moments) == 3 * len(list(lora_parameters(loss)))  # exp_avg, exp_avg_sq and step, of adapters only
    others, other_optimizer = start(1)
    restore_state(others, other_optimizer, tensors)
    for _ in range(3):
        assert step(loss, optimizer) == step(others, other_optimizer)


def test_a_state_dict_contains_model_and_adapters(small_config: GPT2Config) -> None:
    model = with_adapters(small_config, LoRAConfig())
    plain = random_model(small_config, dtype=torch.float64)
    result = plain.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys and set(result.unexpected_keys) == {name for name, _ in named_lora_parameters(model)}
    again = with_adapters(small_config, LoRAConfig(), seed=5)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS), model(IDS))
    assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))


def test_a_model_is_saved_merged_and_keeps_its_adapters(small_config, small_tokenizer, tmp_path) -> None:
    model = with_adapters(small_config, LoRAConfig(), torch.float32)
    expected = model(IDS)
    model.save_pretrained(tmp_path, tokenizer=small_tokenizer)
    assert list(lora_modules(model)) and torch.equal(model(IDS), expected)
    torch.testing.assert_close(load_model(tmp_path)(IDS), expected, atol=1e-5, rtol=0)


def test_adapters_follow_device_and_dtype_of_their_layer(small_config: GPT2Config) -> None:
    model = random_model(small_config, dtype=torch.bfloat16).train()
    add_lora(model, LoRAConfig())
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert all(module.training for module in model.modules())
