"""The greedy head always computes the largest logit of the full head."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2 import GPT2
from gpt2.fast.greedy_head import GreedyHead
from gpt2.fast.limits import GREEDY_HEAD, FastLimits, GreedyHeadLimits
from gpt2.generation.batch import Batch
from gpt2.generation.loop import decode, start
from gpt2.model import TokenEmbedding
from gpt2.quantization.kernels import quantized_rows
from gpt2.quantization.layers import Int8Linear
from gpt_config import GPT2Config
from gpt_config.generation_config import GenerationConfig
from gpt_test.conftest import random_model
from gpt_test.gpt2.fast.watching import Call, calls_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Limits for heads of any size, from the first step on, however many tokens remain.
AT_ONCE = GreedyHeadLimits(min_bytes=0, min_steps=0, pays=dict.fromkeys(DTYPES, (0, 8)), max_part=1)
NEVER = FastLimits(greedy_head=GreedyHeadLimits(min_steps=2**31))


def new_ids(
    model: GPT2, prompts: list[list[int]], config: GenerationConfig, limits: FastLimits, **options: Any
) -> list[list[int]]:
    rows = start(model, prompts, config)
    for _ in decode(Batch(model, fast=limits, **options), rows):
        pass
    return [row.ids for row in rows]


def n_used(calls: list[Call]) -> int:
    """Return the number of steps in which the greedy head was used."""
    return sum(call.returned is not None for call in calls)


def head_of(weight: Tensor) -> TokenEmbedding:
    head = TokenEmbedding(*weight.shape)
    head.weight = torch.nn.Parameter(weight)
    return head


def check(weight: Tensor, hidden: Tensor, vocab_size: int | None = None, limits: GreedyHeadLimits = AT_ONCE) -> int:
    """Check the logits of a greedy head. Returns the number of tokens that it computed with the full weights."""
    head = head_of(weight)
    assert GreedyHead.fits(head, limits)
    with torch.inference_mode():
        every = head.logits(hidden)[:, :vocab_size]
        some = GreedyHead(head, vocab_size, limits).logits(hidden)
    assert some is not None and some.dtype == every.dtype and some.shape == every.shape
    computed = some.isfinite()
    assert computed.gather(1, every.argmax(1, keepdim=True)).all()
    torch.testing.assert_close(some[computed], every[computed])
    assert (every.float().masked_fill(computed, -torch.inf).amax(1) <= every.amax(1)).all()
    return int(computed.any(0).sum())


@given(
    vocab_size=st.integers(1, 300),
    width=st.integers(1, 130),
    rows=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    outlier=st.sampled_from([1, 10, 100]),
    twins=st.booleans(),
    padded=st.booleans(),
)
@settings(max_examples=150)
def test_the_largest_logit_is_computed(
    vocab_size: int, width: int, rows: int, dtype: torch.dtype, seed: int, outlier: int, twins: bool, padded: bool
) -> None:
    """For any shape and number of rows, with outliers among tokens and features, and with equal tokens."""
    torch.manual_seed(seed)
    weight, hidden = torch.randn(vocab_size, width), torch.randn(rows, width)
    weight[seed % vocab_size] *= outlier
    hidden[:, seed % width] *= outlier
    if twins:
        weight[:] = weight[torch.randint(0, vocab_size // 2 + 1, (vocab_size,))]
    limits = replace(AT_ONCE, rows_of_part=77)
    check(weight.to(dtype) / 8, hidden.to(dtype) / 8, max(1, vocab_size - 3) if padded else None, limits)


@pytest.mark.parametrize("rows", [1, 5])
def test_few_of_many_tokens_are_computed(rows: int) -> None:
    torch.manual_seed(0)
    assert check(torch.randn(5000, 64), torch.randn(rows, 64)) <= 4 * rows


def test_rounding_that_lowers_the_largest_logit_and_raises_another() -> None:
    """The errors are as large as the rounding of weights can make them. The largest logit wins by 1% of that."""
    torch.manual_seed(0)
    fraction = torch.rand(32) * 0.9 - 0.45
    fraction[:2] = 0
    whole = torch.randint(-100, 100, (32,)).float()
    whole[:2] = torch.tensor([127, 0])  # so that the step is 1
    weight = torch.stack([whole + fraction, whole - fraction])
    weight[1, 1] = 100
    hidden = fraction / fraction.norm()
    hidden[1] = 1.99 * fraction.norm() / 100
    check(weight, hidden[None])


def test_rounding_of_inputs_that_lowers_the_largest_logit() -> None:
    """All weights are multiples of the step. All inputs except the largest are just below the middle between two digits."""
    torch.manual_seed(0)
    sign, width = torch.randint(0, 2, (64,)) * 2.0 - 1, 64
    hidden = sign * (torch.randint(0, 40, (width,)) + (torch.randint(0, 40, (width,)) + 0.49) / 126)
    hidden[0] = 63
    weight = torch.zeros(100, width)
    weight[7] = sign
    weight[7, 0] = 0
    weight[9, 0] = (weight[7] @ hidden - 0.02) / 63
    assert check(weight, hidden[None]) < 100


def test_tokens_whose_rounded_logits_are_equal_are_all_computed() -> None:
    weight, hidden = torch.tensor([[127.0, 26.0], [127.0, 51.0]]), torch.tensor([[1.0, 1 / 256]])
    assert check(weight.bfloat16(), hidden.bfloat16()) == 2  # 127.1 and 127.2 are both 127


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_zero_or_invalid_inputs_exclude_no_token(bad: float) -> None:
    hidden = torch.randn(2, 16)
    hidden[1] = bad
    logits = GreedyHead(head_of(torch.randn(50, 16)), None, AT_ONCE).logits(hidden)
    assert logits is not None and not logits.isneginf().all(0).any()


def test_a_head_with_too_wide_bounds_is_no_longer_used() -> None:
    limits = replace(AT_ONCE, max_part=1 / 32)
    flat = head_of(torch.ones(64, 16))  # all logits are equal
    for n_tries in range(1, 4):
        generation = GreedyHead(flat, None, limits)
        assert generation.leave_alone(9) == 0
        assert generation.logits(torch.randn(1, 16)) is None
        assert generation.leave_alone(9) == (9 if n_tries == 3 else 0)  # from then on all steps need all logits
    assert [generation.logits(torch.randn(1, 16)) for _ in range(4)] == [None] * 4


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), 1e30])
def test_damaged_weights_need_the_full_head(damage: float) -> None:
    weight = torch.randn(50, 16)
    weight[3, 4] = damage
    assert GreedyHead(head_of(weight), None, AT_ONCE).logits(torch.randn(1, 16)) is None
    assert GreedyHead(head_of(torch.randn(50, 16) * 1e-22), None, AT_ONCE).logits(torch.randn(1, 16)) is None


def test_int8_weights_are_kept_until_the_weights_change() -> None:
    hidden = torch.randn(1, 16)
    weight = torch.zeros(50, 16)
    weight[:9] = -hidden * torch.rand(9, 1)  # the others are larger
    head = head_of(weight)
    with calls_of(quantized_rows) as made:
        assert GreedyHead(head, None, AT_ONCE).logits(hidden) is not None
        assert GreedyHead(head, None, AT_ONCE).logits(hidden) is not None
        fewer_logits = GreedyHead(head, 9, AT_ONCE).logits(hidden)
    assert fewer_logits is not None and fewer_logits.shape == (1, 9)
    assert len(made) == 1
    with torch.no_grad():
        head.weight.data[[7, 8]] = head.weight.data[[8, 7]].clone()  # this does not change the tensor's version
        assert GreedyHead(head, None, AT_ONCE).logits(hidden) is None
        assert GreedyHead(head, None, AT_ONCE).logits(hidden) is not None
        generation = GreedyHead(head, None, AT_ONCE)
        assert generation.logits(hidden) is not None
        head.weight[7] = 100 * hidden[0]
        assert generation.logits(hidden) is None
    assert GreedyHead(head, None, AT_ONCE).logits(hidden) is None
    changed = GreedyHead(head, None, AT_ONCE).logits(hidden)
    assert changed is not None and int(changed.argmax()) == 7
    kept = weakref.ref(head)
    del head, generation
    gc.collect()
    assert kept() is None


def test_it_is_used_after_the_steps_that_repay_it() -> None:
    limits = replace(GREEDY_HEAD, min_bytes=0, max_part=1)
    head, hidden = head_of(torch.randn(50, 16)), torch.randn(1, 16)
    wait, max_rows = limits.pays[torch.float32]
    short = GreedyHead(head, None, limits)
    assert all(short.logits(hidden) is None for _ in range(wait - 1))
    longer = GreedyHead(head, None, limits)  # the next generation continues to count
    assert longer.logits(hidden) is None
    assert longer.logits(hidden) is not None
    assert longer.logits(hidden.expand(max_rows + 1, -1)) is None


def test_which_heads_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = head_of(torch.zeros(10, 10)), head_of(torch.zeros(2**20, 8))
    assert GreedyHead.fits(large) and not GreedyHead.fits(small)
    assert not GreedyHead.fits(head_of(torch.zeros(2**20, 8, dtype=torch.float64)))
    assert not GreedyHead.fits(head_of(torch.zeros(2**20, 8, device="meta")))
    assert not GreedyHead.fits(Int8Linear(torch.zeros(2**25, 1, dtype=torch.int8), torch.ones(2**25), None))
    with torch.inference_mode():
        assert not GreedyHead.fits(head_of(torch.zeros(2**20, 8)))
    assert not GreedyHead.fits(large, GreedyHeadLimits(engines=("onednn", "qnnpack")))  # they lack the operator
    monkeypatch.setattr(torch.ops, "quantized", object())
    assert not GreedyHead.fits(large)


def test_under_autocast_and_in_short_texts_it_is_not_used(small_model: GPT2) -> None:
    limits = FastLimits(greedy_head=AT_ONCE)
    with calls_of(GreedyHead.logits) as calls:
        with torch.autocast("cpu", torch.bfloat16):
            new_ids(small_model, [[1]], GenerationConfig(max_new_tokens=3), limits)
            assert GreedyHead(small_model.wte, None, AT_ONCE).logits(torch.randn(1, 24)) is None
        assert not n_used(calls)
        new_ids(small_model, [[1]], GenerationConfig(max_new_tokens=3), limits)
        assert n_used(calls)
        calls.clear()
        n = GREEDY_HEAD.min_steps - 1
        limits = FastLimits(greedy_head=replace(AT_ONCE, min_steps=GREEDY_HEAD.min_steps))
        new_ids(small_model, [[1]], GenerationConfig(max_new_tokens=n), limits)
        assert not n_used(calls)


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_ids_equal_those_of_all_logits(dtype: torch.dtype, small_config: GPT2Config) -> None:
    """With padding, past the context, and with rows that end and are removed from the batch."""
    model = random_model(small_config, seed=3).to(dtype)
    prompts = [ids[-n:].tolist() for ids, n in zip(torch.randint(0, 300, (3, 7)), (7, 4, 1), strict=True)]
    config = GenerationConfig(max_new_tokens=small_config.n_positions + 9)
    for rows in (1, 3):
        with calls_of(GreedyHead.logits) as calls:
            fast = new_ids(model, prompts[:rows], config, FastLimits(greedy_head=AT_ONCE))
        assert n_used(calls)
        assert fast == new_ids(model, prompts[:rows], config, NEVER)


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "seed": 1}, {"repetition_penalty": 1.5}, {"num_beams": 2}, {"speculate": True}],
    ids=lambda options: next(iter(options)),
)
def test_other_decoding_methods_are_unchanged(options: dict[str, Any], small_model: GPT2) -> None:
    prompts, config = [[5, 6, 5, 6, 5, 6]], GenerationConfig(max_new_tokens=12, **options)
    with calls_of(GreedyHead.logits) as calls:
        ids = new_ids(small_model, prompts, config, FastLimits(greedy_head=AT_ONCE))
    assert bool(n_used(calls)) == ("speculate" in options)
    assert ids == new_ids(small_model, prompts, config, NEVER)


def test_log_probabilities_come_from_all_logits(small_model: GPT2) -> None:
    config = GenerationConfig(max_new_tokens=5)
    rows = start(small_model, [[1, 2, 3]], config, logprobs=True)
    with calls_of(GreedyHead.logits) as calls:
        for _ in decode(Batch(small_model, fast=FastLimits(greedy_head=AT_ONCE)), rows):
            pass
    assert not n_used(calls)
    assert all(-20 < value < 0 for value in rows[0].logprobs)


def test_only_ids_of_the_tokenizer_are_chosen(small_model: GPT2) -> None:
    config = GenerationConfig(max_new_tokens=8, stop_at_eot=False)
    with calls_of(GreedyHead.logits) as calls:
        [ids] = new_ids(small_model, [[1, 2, 3]], config, FastLimits(greedy_head=AT_ONCE), vocab_size=9)
    assert n_used(calls) and max(ids) < 9
