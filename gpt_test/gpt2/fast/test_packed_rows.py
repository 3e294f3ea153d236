"""Steps of several rows in float32 with weights packed by oneDNN: the same ids, and packed only where that is right."""

from __future__ import annotations

import copy
import platform
from typing import Any

import pytest
import torch

from gpt2 import GPT2
from gpt2.fast.limits import NOTHING_FAST, FastLimits
from gpt2.fast.linear import fast_linear, is_kept_packed
from gpt2.generation.batch import Batch
from gpt2.generation.loop import decode, start
from gpt2.generation.slot_batch import SlotBatch, Slots
from gpt2.quantization.quantize import quantize_int8
from gpt_config import GenerationConfig, GPT2Config
from gpt_test.conftest import random_model

AT_ONCE = FastLimits(steps_before_packing=0)
PROMPTS = [[1, 2, 3], [4] * 9, [5, 6]]

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="weights are packed on x86 processors only",
)


@pytest.fixture
def model() -> GPT2:
    return random_model(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300, n_positions=64))


def ids_of(batch: Batch, model: GPT2, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[list[int]]:
    config = GenerationConfig(**{"max_new_tokens": 20, "do_sample": True, "seed": 1, "stop_at_eot": False, **options})
    rows = start(model, prompts, config)
    for _ in decode(batch, rows):
        pass
    return [row.ids for row in rows]


def in_slots(model: GPT2, fast: FastLimits = AT_ONCE) -> Batch:
    return SlotBatch(model, Slots(model, len(PROMPTS)), fast=fast)


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("in_python", [False, True])
def test_packed_weights_give_the_same_ids(model: GPT2, steps: int, in_python: bool) -> None:
    fast = FastLimits(steps_before_packing=steps, use_torchscript=not in_python, rows_for_python=8)
    wanted = ids_of(Batch(model, fast=NOTHING_FAST), model)
    assert ids_of(Batch(model, fast=fast), model) == wanted and is_kept_packed(model.wte)
    assert ids_of(in_slots(model, fast), model) == wanted
    long = [[7] * 30, [8] * 20]  # prompts of more rows than a step
    batch = in_slots(model, fast)
    assert ids_of(batch, model) == wanted
    assert ids_of(batch, model, long) == ids_of(Batch(model, fast=NOTHING_FAST), model, long)


def test_the_logits_differ_by_rounding_only(model: GPT2) -> None:
    """And they do differ: the packed weights were used."""
    logits = {}
    for name, fast in (("plain", FastLimits(steps_before_packing=10**6)), ("packed", AT_ONCE)):
        rows = start(model, PROMPTS, GenerationConfig(max_new_tokens=20, stop_at_eot=False), logprobs=True)
        for _ in decode(Batch(model, fast=fast), rows):
            pass
        logits[name] = torch.tensor([row.logprobs for row in rows])
    torch.testing.assert_close(logits["plain"], logits["packed"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampled", [False, True])
def test_float32_without_mkl_gives_the_same_ids(model: GPT2, sampled: bool) -> None:
    """Alone, in a batch and in slots, before and after the weights are packed."""
    wanted = [ids_of(Batch(model, fast=NOTHING_FAST), model, [prompt], do_sample=sampled) for prompt in PROMPTS]
    for steps in (0, 5, 1000):
        fast = FastLimits(avoid_mkl=True, min_bytes_without_mkl=0, steps_before_packing=steps)
        assert [ids_of(Batch(model, fast=fast), model, [prompt], do_sample=sampled) for prompt in PROMPTS] == wanted
        assert ids_of(Batch(model, fast=fast), model, do_sample=sampled) == [ids for row in wanted for ids in row]
        assert ids_of(in_slots(model, fast), model, do_sample=sampled) == [ids for row in wanted for ids in row]


def test_bfloat16_has_the_same_bits_before_and_after_packing(model: GPT2) -> None:
    model = model.bfloat16()
    if fast_linear(model.h[0].mlp.c_fc, FastLimits(bfloat16_by_float16=True)).kind != "bfloat16 by float16":
        pytest.skip("this processor multiplies bfloat16 with one kernel")
    logprobs = []
    for steps in (10**6, 0):
        rows = start(model, PROMPTS, GenerationConfig(max_new_tokens=20, stop_at_eot=False), logprobs=True)
        for _ in decode(
            Batch(model, fast=FastLimits(steps_before_packing=steps, bfloat16_by_float16=True, tokens_by_float16=0)), rows
        ):
            pass
        logprobs.append([row.logprobs for row in rows])
        assert is_kept_packed(model.wte) == (steps == 0)
    assert logprobs[0] == logprobs[1]


def test_short_texts_and_single_rows_pack_nothing(model: GPT2) -> None:
    ids_of(Batch(model), model, max_new_tokens=10)
    assert not is_kept_packed(model.wte)
    ids_of(Batch(model, fast=AT_ONCE), model, [[1]], max_new_tokens=40)
    assert not is_kept_packed(model.wte)
    ids_of(Batch(model), model, max_new_tokens=30)
    assert is_kept_packed(model.wte)


@pytest.mark.parametrize("change", ["in place", "data", "replaced"])
def test_changed_weights_are_packed_again(model: GPT2, change: str) -> None:
    batch = in_slots(model)
    before = ids_of(batch, model)
    weight = model.h[0].mlp.c_fc.weight
    changed = torch.randn_like(weight)
    if change == "in place":
        with torch.no_grad():
            weight.copy_(changed)
    elif change == "data":  # torch does not count it, so it needs a new batch
        weight.data.copy_(changed)
        batch = in_slots(model)
    else:
        model.h[0].mlp.c_fc.weight = torch.nn.Parameter(changed)
    after = ids_of(batch, model)
    assert after != before and after == ids_of(Batch(model, fast=NOTHING_FAST), model)


@pytest.mark.parametrize("free, is_packed", [(1000, False), (10**9, True), (None, True)])
def test_it_needs_free_memory(model: GPT2, monkeypatch: pytest.MonkeyPatch, free: int | None, is_packed: bool) -> None:
    monkeypatch.setattr("gpt2.fast.packed_rows.free_memory", lambda: free)
    ids_of(Batch(model, fast=AT_ONCE), model)
    assert is_kept_packed(model.wte) == is_packed


@pytest.mark.parametrize("kind", ["float64", "int8"])
def test_other_weights_are_left_as_they_are(model: GPT2, kind: str) -> None:
    other = copy.deepcopy(model).double() if kind == "float64" else quantize_int8(copy.deepcopy(model))
    ids_of(Batch(other, fast=AT_ONCE), other)
    assert not is_kept_packed(other.wte)
