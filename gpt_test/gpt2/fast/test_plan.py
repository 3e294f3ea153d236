"""The decode plan has the bits of the model; where it does not fit, the model itself is called."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpt2 import GPT2, KVCache
from gpt2.fast.limits import FastLimits
from gpt2.fast.plan import DecodePlan, PlanOfEach, cache_dtype
from gpt2.generation.decoder import Decoder
from gpt2.generation.window import Window
from gpt2.model import Conv1D
from gpt2.quantization.layers import Int8Linear
from gpt2.quantization.quantize import quantize_int8
from gpt_config import GPT2Config
from gpt_test.conftest import random_model, skip_unless_rows_are_rounded_alone
from gpt_test.gpt2.fast.watching import calls_of
from gpt_test.gpt2.test_model import configs, ids_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@given(config=configs(), rows=st.integers(1, 3), data=st.data())
@settings(max_examples=25)
def test_the_bits_are_those_of_the_model(dtype: torch.dtype, config: GPT2Config, rows: int, data: st.DataObject) -> None:
    """For calls of any length, without padding or with padding anywhere, with the kernels of the model."""
    model = random_model(config).to(dtype)
    ids = ids_for(config, rows, config.n_positions)
    is_padded = data.draw(st.booleans())
    mask = (torch.rand(rows, config.n_positions, generator=torch.manual_seed(0)) < 0.7).long() if is_padded else None
    plan = DecodePlan(model, limits=FastLimits(pack_float16=False, avoid_mkl=False))
    caches = [KVCache(config, batch_size=rows, dtype=dtype) for _ in range(2)]
    done = 0
    with torch.inference_mode():
        while done < config.n_positions:
            until = data.draw(st.integers(done + 1, config.n_positions))
            seen = None if mask is None else mask[:, :until]
            expected = model(ids[:, done:until], attention_mask=seen, kv_cache=caches[0])
            hidden = plan.hidden_states(ids[:, done:until], attention_mask=seen, kv_cache=caches[1])
            assert torch.equal(plan.logits(hidden), expected)
            done = until
    for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("cached", [0, 4])
def test_of_a_prompt_the_last_token_may_be_all(
    small_config: GPT2Config, dtype: torch.dtype, is_padded: bool, cached: int
) -> None:
    """Keys and values of the others are the same. In float32 all tokens are computed, because the bits are the model's."""
    model, ids = random_model(small_config, dtype=dtype), ids_for(small_config, 2, 20)
    mask = torch.ones_like(ids)
    mask[0, : 3 * is_padded] = 0
    hidden, caches = [], []
    for only_last in (False, True):
        plan = DecodePlan(model, only_last=only_last, limits=FastLimits(rows_for_python=1))
        cache = KVCache(small_config, batch_size=2, dtype=cache_dtype(model))
        with torch.inference_mode():
            for ids_of_part, seen in ((ids[:, :cached], mask[:, :cached]), (ids[:, cached:], mask)):
                if ids_of_part.numel():
                    states = plan.hidden_states(ids_of_part, attention_mask=seen if is_padded else None, kv_cache=cache)
        hidden.append(states)
        caches.append([layer[..., :20, :] for layer in cache.layers])
    assert hidden[1].shape[1] == (20 - cached if dtype == torch.float32 else 1)
    torch.testing.assert_close(hidden[1][:, -1], hidden[0][:, -1], atol=0.05, rtol=0.05)
    assert all(map(torch.equal, *caches))


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float16"])
@given(config=configs(), data=st.data())
@settings(max_examples=25)
def test_in_few_bits_drafts_have_the_bits_of_single_steps(dtype: str, config: GPT2Config, data: st.DataObject) -> None:
    """With and without padding before them."""
    if dtype == "int8":
        skip_unless_rows_are_rounded_alone()
    model = random_model(config)
    model = quantize_int8(model) if dtype == "int8" else model.to(getattr(torch, dtype))
    if dtype == "int8":  # a weight may be negligible compared with the bias, for example in a row of one input
        assume(all(layer.units_and_sums() is not None for layer in model.modules() if isinstance(layer, Int8Linear)))
    of_each = DecodePlan(model).for_drafts
    assert isinstance(of_each, PlanOfEach)
    n = config.n_positions
    ids, past = ids_for(config, 1, n), data.draw(st.integers(1, n))
    is_padded = past > 1 and data.draw(st.booleans())
    mask = (torch.arange(n)[None] > 0).long() if is_padded else None
    plan, states, caches = DecodePlan(model), [], []
    with torch.inference_mode():
        for ends in (range(past, n + 1), (past, n)):
            cache, done, hidden = KVCache(config, batch_size=1, dtype=model.dtype), 0, []
            for until in ends:
                if until > done:
                    seen = None if mask is None else mask[:, :until]
                    network = of_each if done else plan
                    some = network.hidden_states(ids[:, done:until], attention_mask=seen, kv_cache=cache)
                    hidden.append(some)
                done = until
            states.append(torch.cat(hidden, 1)[0])
            caches.append(cache.layers)
        assert torch.equal(*states)
        assert all(map(torch.equal, *caches))
        few = states[0][:17]  # the most rows of a step with drafts
        assert torch.equal(of_each.logits(few), torch.cat(list(map(plan.logits, few.split(1)))))


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [9, 13, 32])
def test_drafts_have_the_bits_of_single_steps_for_any_size_of_heads(dtype: str, head_dim: int) -> None:
    """With odd sizes, queries of drafts are not aligned like those of single steps, which could change their rounding."""
    if dtype == "int8":
        skip_unless_rows_are_rounded_alone()
    config = GPT2Config(vocab_size=2, n_positions=20, n_embd=2 * head_dim, n_layer=1, n_head=2, scale_attn_weights=False)
    model = random_model(config)
    model = quantize_int8(model) if dtype == "int8" else model.to(getattr(torch, dtype))
    plan, ids = DecodePlan(model), ids_for(config, 1, 20)
    of_each = plan.for_drafts
    assert isinstance(of_each, PlanOfEach)
    with torch.inference_mode():
        for past in range(1, 20):
            states = []
            for ends in (range(past + 1, 21), (20,)):
                cache, done, hidden = KVCache(config, dtype=model.dtype), past, []
                plan.hidden_states(ids[:, :past], attention_mask=None, kv_cache=cache)
                for end in ends:
                    hidden.append(of_each.hidden_states(ids[:, done:end], attention_mask=None, kv_cache=cache))
                    done = end
                states.append(torch.cat(hidden, 1))
            assert torch.equal(*states), f"{past} cached tokens"


def test_it_is_used_for_an_unchanged_model_only(small_config: GPT2Config) -> None:
    class Louder(Conv1D):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert DecodePlan.fits(random_model(small_config))
    assert not DecodePlan.fits(random_model(small_config).train())
    hooked = random_model(small_config)
    hooked.h[1].mlp.register_forward_hook(lambda *_: None)
    assert not DecodePlan.fits(hooked)
    patched = random_model(small_config)
    patched.wte.forward = lambda ids: 0 * patched.wpe(ids)  # type: ignore[method-assign]
    assert not DecodePlan.fits(patched)
    swapped = random_model(small_config)
    louder = Louder(24, 96).eval()
    louder.load_state_dict(swapped.h[0].mlp.c_fc.state_dict())
    swapped.h[0].mlp.c_fc = louder
    assert not DecodePlan.fits(swapped)
    cached = swapped.generate(torch.tensor([[1]]), max_new_tokens=20)
    assert torch.equal(cached, swapped.generate(torch.tensor([[1]]), max_new_tokens=20, use_cache=False))


def test_the_decoder_uses_it(small_model: GPT2) -> None:
    """Without this test, the plan could be unused and all other tests would still pass."""
    decoder = Decoder(small_model, [Window([1, 2], 40), Window([3], 40)], 5)
    with calls_of(DecodePlan.hidden_states) as calls:
        for _ in range(5):
            for window, token in zip(decoder.windows, decoder.next_logits().argmax(-1).tolist(), strict=True):
                window.ids.append(token)
    assert len(calls) == 5
