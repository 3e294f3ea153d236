"""The model gives the logits and gradients of transformers' GPT-2, for many configurations; padding, caches, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2 import GPT2, KVCache
from gpt2.dropout import dropout
from gpt2.model import Conv1D
from gpt_config import ConfigError, GPT2Config, InputError, InputTypeError
from gpt_test.conftest import random_model, transformers_twin

ODD = {"vocab_size": 101, "n_positions": 37, "n_embd": 60, "n_layer": 3, "n_head": 5}


@st.composite
def configs(draw: st.DrawFn) -> GPT2Config:
    n_head = draw(st.integers(1, 6))
    return GPT2Config(
        vocab_size=draw(st.integers(2, 120)),
        n_positions=draw(st.integers(1, 40)),
        n_embd=n_head * draw(st.integers(1, 13)),
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_inner=draw(st.none() | st.integers(1, 90)),
        activation_function=draw(st.sampled_from(["gelu_new", "gelu_new", "gelu", "relu", "gelu_pytorch_tanh"])),
        scale_attn_weights=draw(st.booleans()),
        scale_attn_by_inverse_layer_idx=draw(st.booleans()),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
    )


def ids_for(config: GPT2Config, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@given(config=configs(), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=40)
def test_logits_equal_transformers(dtype: torch.dtype, tolerance: float, config: GPT2Config, seed: int, data) -> None:
    model = random_model(config, seed, dtype)
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, config.n_positions))
    ids = ids_for(config, rows, length, seed)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), transformers_twin(model)(ids).logits, atol=tolerance, rtol=0)


@pytest.mark.parametrize("batch_equals_length", [True, False])
def test_odd_sizes_and_as_many_rows_as_tokens(batch_equals_length: bool) -> None:
    config = GPT2Config(**ODD, n_inner=77)
    model = random_model(config, dtype=torch.float64)
    ids = ids_for(config, 37 if batch_equals_length else 2, 37)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), transformers_twin(model)(ids).logits, atol=1e-10, rtol=0)


def test_training_gradients_equal_transformers() -> None:
    config = GPT2Config(**ODD, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = random_model(config, dtype=torch.float64).train()
    twin, ids = transformers_twin(model).train(), ids_for(config, 2, 20)
    losses = []
    for logits in (model(ids), twin(ids).logits):
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        losses[-1].backward()
    torch.testing.assert_close(*losses, atol=1e-12, rtol=0)
    theirs = dict(twin.transformer.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-11, rtol=0, msg=name)


@given(data=st.data())
@settings(max_examples=60)
def test_padding_anywhere_changes_no_row(data) -> None:
    """With padding on the left, on the right or in the middle, each row has the logits that it has without padding."""
    config = GPT2Config(**ODD)
    model = random_model(config, dtype=torch.float64)
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4)))
    ids = ids_for(config, len(mask), 9)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask.long())
        assert not logits.isnan().any()
        for row, kept in enumerate(mask):
            if kept.any():
                alone = model(ids[row, kept][None])[0]
                torch.testing.assert_close(logits[row, kept], alone, atol=1e-12, rtol=0)


def test_a_padded_batch_may_be_wider_than_the_context() -> None:
    """Positions count tokens only, so padding does not use up the context."""
    config = GPT2Config(**{**ODD, "n_positions": 5})
    model = random_model(config)
    ids, mask = ids_for(config, 1, 9), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, attention_mask=mask)[0, 4:], model(ids[:, 4:])[0], atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="6 tokens are more than the 5 positions"):
        model(ids, attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]))


@given(data=st.data())
@settings(max_examples=40)
def test_a_cache_filled_in_several_calls_changes_no_logits(data) -> None:
    config = GPT2Config(**ODD)
    model = random_model(config, dtype=torch.float64)
    cuts = sorted(data.draw(st.sets(st.integers(1, 19), max_size=6)))
    padded = data.draw(st.booleans())
    ids = ids_for(config, 2, 20)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3], mask[1, 5:7] = 0, 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask if padded else None)
        cache = KVCache(config, batch_size=2, max_length=20, dtype=torch.float64)
        parts = [
            model(ids[:, a:b], attention_mask=mask[:, :b] if padded else None, kv_cache=cache)
            for a, b in zip([0, *cuts], [*cuts, 20], strict=True)
        ]
    assert cache.length == 20
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-12, rtol=0)


def test_cache_rows_can_be_chosen() -> None:
    config = GPT2Config(**ODD)
    model, ids = random_model(config), ids_for(config, 3, 8)
    cache = KVCache(config, batch_size=3, max_length=9)
    with torch.no_grad():
        model(ids, kv_cache=cache)
        cache.select(torch.tensor([2, 0, 2]))
        chosen = ids[[2, 0, 2]]
        new = torch.tensor([[1], [2], [3]])
        expected = model(torch.cat([chosen, new], 1))[:, -1:]
        torch.testing.assert_close(model(new, kv_cache=cache), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[101]], {}, "token id 101 is outside the vocabulary of this model: ids go from 0 to 100"),
        ([[3, -1]], {}, "token id -1 is outside"),
        ([[0] * 38], {}, "38 tokens are more than the 37 positions"),
        ([0, 1], {}, "must be \\(batch, tokens\\)"),
        ([[0.5]], {}, "must be \\(batch, tokens\\) of int64"),
        ([[0, 1]], {"attention_mask": torch.ones(1, 3)}, "it must be \\(1, 2\\)"),
    ],
)
def test_bad_input_is_one_clear_line(ids: list, options: dict, message: str) -> None:
    model = random_model(GPT2Config(**ODD))
    with pytest.raises(InputError, match=message) as caught:
        model(torch.tensor(ids), **options)
    assert "\n" not in str(caught.value)


def test_a_refused_call_leaves_the_cache_unchanged() -> None:
    config = GPT2Config(**ODD)
    model, cache = random_model(config), KVCache(config, max_length=4)
    model(torch.tensor([[1, 2]]), kv_cache=cache)
    with pytest.raises(InputError, match="holds 2 of at most 4 tokens and has no room for 3 more"):
        model(torch.tensor([[1, 2, 3]]), kv_cache=cache)
    with pytest.raises(InputError, match="2 rows and the cache has 1"):
        model(torch.tensor([[1], [2]]), kv_cache=cache)
    with pytest.raises(InputError, match="token id 999"):
        model(torch.tensor([[999]]), kv_cache=cache)
    assert cache.length == 2
    with pytest.raises(InputError, match=r"the cache is torch.float32 on cpu and the model computes in torch.float64"):
        random_model(config, dtype=torch.float64)(torch.tensor([[1]]), kv_cache=cache)


def test_what_is_not_a_tensor_is_refused() -> None:
    model = random_model(GPT2Config(**ODD))
    for arguments in ({"input_ids": [[1, 2]]}, {"input_ids": torch.tensor([[1]]), "attention_mask": [[1]]}):
        with pytest.raises(InputTypeError, match="must be a tensor"):
            model(**arguments)


def test_initialisation_is_openais() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=2000, n_positions=512, n_embd=128, n_layer=8, n_head=4)
    model = GPT2(config)
    expected = {
        "wte.weight": 0.02,
        "wpe.weight": 0.01,
        "h.3.attn.c_attn.weight": 0.02,
        "h.3.mlp.c_fc.weight": 0.02,
        "h.3.attn.c_proj.weight": 0.02 / math.sqrt(16),
        "h.3.mlp.c_proj.weight": 0.02 / math.sqrt(16),
    }
    parameters = dict(model.named_parameters())
    for name, std in expected.items():
        assert parameters[name].std().item() == pytest.approx(std, rel=0.05), name
        assert abs(parameters[name].mean().item()) < 0.002
    for name, parameter in parameters.items():
        if name.endswith("bias"):
            assert not parameter.any()
        elif ".ln_" in name or name.startswith("ln_f"):
            assert (parameter == 1).all()


def test_names_and_shapes_are_the_published_ones() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Model(transformers.GPT2Config(**ODD)).state_dict()
    ours = GPT2(GPT2Config(**ODD)).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: tensor.shape for name, tensor in theirs.items()}


def test_dropout_in_training_only() -> None:
    config = GPT2Config(**ODD)
    model, ids = random_model(config), ids_for(config, 1, 10)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


class OurDropout(torch.nn.Module):
    """torch.nn.Dropout with the random draws of this package."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


def attention_with_our_draws(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **options: float
) -> tuple[Tensor, Tensor]:
    """Return what transformers expects of causal attention: from q, k, v (B, H, T, D) to (B, T, H, D), and the weights."""
    scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(torch.ones(q.shape[2], k.shape[2]).triu(1) > 0, -torch.inf)
    weights = dropout(scores.softmax(-1), options["dropout"], module.training)
    return (weights @ v).transpose(1, 2), weights


@pytest.mark.parametrize("where", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_is_where_gpt2_has_it(where: str) -> None:
    """With the same random draws and one dropout rate above 0 at a time, transformers' model drops the same elements."""
    transformers = pytest.importorskip("transformers")
    transformers.AttentionInterface.register("causal_with_our_draws", attention_with_our_draws)
    config = GPT2Config(**ODD, **{**dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0), where: 0.3})
    model = random_model(config).train()
    twin, ids = transformers_twin(model).train(), ids_for(config, 2, 12)
    twin.set_attn_implementation("causal_with_our_draws")
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Dropout):
                setattr(module, name, OurDropout(child.p))
    torch.manual_seed(1)
    ours = model(ids)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, twin(ids).logits, atol=1e-4, rtol=0)


def test_conv1d_is_a_linear_layer() -> None:
    layer = Conv1D(3, 5)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias)


def test_a_model_can_be_compiled_to_a_graph() -> None:
    """The model has no data-dependent Python that would stop torch.export and torch.compile."""
    config = GPT2Config(**ODD)
    model, ids = random_model(config), ids_for(config, 2, 8)
    exported = torch.export.export(model, (ids,)).module()
    torch.testing.assert_close(exported(ids), model(ids), atol=1e-5, rtol=0)


def test_a_refused_config_makes_no_model() -> None:
    with pytest.raises(ConfigError):
        GPT2(GPT2Config(n_embd=10, n_head=3))


def test_a_cache_for_another_model_is_refused_in_one_line() -> None:
    model = random_model(GPT2Config(**ODD))
    for other in ({"n_layer": 1}, {"n_head": 1}, {"n_embd": 3 * ODD["n_embd"]}):
        cache = KVCache(GPT2Config(**{**ODD, **other}))
        with pytest.raises(
            InputError, match=r"^the cache is for \d layers of \d heads of size \d+, and this model has"
        ) as caught:
            model(torch.tensor([[1]]), kv_cache=cache)
        assert "\n" not in str(caught.value) and cache.length == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["last layer", "final norm", "head"])
def test_an_exception_in_a_call_leaves_the_cache_unchanged(where: str, error: type[BaseException]) -> None:
    """After Ctrl-C or an exception in a hook, the same call gives the expected logits."""
    config = GPT2Config(**ODD)
    model, cache = random_model(config), KVCache(config)
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3, 4]]))[:, 2:]
        model(torch.tensor([[1, 2]]), kv_cache=cache)

        def fail(*_: object) -> None:
            raise error

        hook = (model.h[-1] if where == "last layer" else model.ln_f).register_forward_hook(fail)
        if where == "head":
            hook.remove()
            model.logits = fail
        with pytest.raises(error):
            model(torch.tensor([[3, 4]]), kv_cache=cache)
        hook.remove()
        vars(model).pop("logits", None)
        assert cache.length == 2
        torch.testing.assert_close(model(torch.tensor([[3, 4]]), kv_cache=cache), expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_copied_cache_is_independent(mode) -> None:
    config = GPT2Config(**ODD)
    model, cache = random_model(config), KVCache(config)
    with mode():
        model(torch.tensor([[1, 2]]), kv_cache=cache)
    other = copy.deepcopy(cache)
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3]]))[:, -1]
        torch.testing.assert_close(model(torch.tensor([[3]]), kv_cache=other)[:, -1], expected)
        assert (cache.length, other.length) == (2, 3)
        torch.testing.assert_close(model(torch.tensor([[3]]), kv_cache=cache)[:, -1], expected)


def test_a_token_attends_to_cached_tokens_in_training_too() -> None:
    """On a CPU, attention with dropout is written out and makes its own causal mask."""
    rates = {"attn_pdrop": 1e-9, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # the rate drops nothing, but selects that code
    config = GPT2Config(**ODD, **rates)
    model, cache = random_model(config).train(), KVCache(config)
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3]]))[:, -1]
        model(torch.tensor([[1, 2]]), kv_cache=cache)
        torch.testing.assert_close(model(torch.tensor([[3]]), kv_cache=cache)[:, -1], expected)
