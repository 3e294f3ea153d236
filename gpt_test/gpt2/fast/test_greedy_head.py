"""The greedy head against the whole head: the largest logit is always among those it computes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2 import GPT2
from gpt2.fast import greedy_head
from gpt2.fast.greedy_head import GreedyHead
from gpt2.generation.batch import Batch
from gpt2.generation.loop import decode, start
from gpt2.model import TokenEmbedding
from gpt2.quantization.layers import Int8Linear
from gpt_config import GPT2Config
from gpt_config.generation_config import GenerationConfig
from gpt_test.conftest import random_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For heads of any size, from the first step on, however many rows are left."""
    monkeypatch.setattr(greedy_head, "_MIN_BYTES", 0)
    monkeypatch.setattr(greedy_head, "_PAYS", dict.fromkeys(DTYPES, (0, 8)))
    monkeypatch.setattr(greedy_head, "_MAX_PART", 1)
    monkeypatch.setattr("gpt2.generation.decoder.MIN_STEPS", 0)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens it left at each step."""
    counts: list[int] = []
    own = GreedyHead.logits

    def logits(self: GreedyHead, hidden_states: Tensor) -> Tensor | None:
        result = own(self, hidden_states)
        if result is not None:
            counts.append(int(result.isfinite().any(0).sum()))
        return result

    monkeypatch.setattr(GreedyHead, "logits", logits)
    yield counts


def head_of(weight: Tensor) -> TokenEmbedding:
    head = TokenEmbedding(*weight.shape)
    head.weight = torch.nn.Parameter(weight)
    return head


def check(weight: Tensor, hidden: Tensor, vocab_size: int | None = None) -> int:
    """How many tokens are left."""
    head = head_of(weight)
    assert GreedyHead.fits(head)
    with torch.inference_mode():
        every = head.logits(hidden)[:, :vocab_size]
        some = GreedyHead(head, vocab_size).logits(hidden)
    assert some is not None and some.dtype == every.dtype and some.shape == every.shape
    left = some.isfinite()
    assert left.gather(1, every.argmax(1, keepdim=True)).all()
    torch.testing.assert_close(some[left], every[left])
    assert (every.float().masked_fill(left, -torch.inf).amax(1) <= every.amax(1)).all()
    return int(left.any(0).sum())


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
def test_the_largest_is_among_them(
    vocab_size: int, width: int, rows: int, dtype: torch.dtype, seed: int, outlier: int, twins: bool, padded: bool
) -> None:
    """For any shape and number of rows, with tokens and features that stand out, and with tokens that tie."""
    torch.manual_seed(seed)
    weight, hidden = torch.randn(vocab_size, width), torch.randn(rows, width)
    weight[seed % vocab_size] *= outlier
    hidden[:, seed % width] *= outlier
    if twins:
        weight[:] = weight[torch.randint(0, vocab_size // 2 + 1, (vocab_size,))]
    with pytest.MonkeyPatch.context() as patch:
        at_once.__wrapped__(patch)
        patch.setattr(greedy_head, "_ROWS_OF_PART", 77)
        check(weight.to(dtype) / 8, hidden.to(dtype) / 8, max(1, vocab_size - 3) if padded else None)


@pytest.mark.parametrize("rows", [1, 5])
def test_few_are_left_of_many(rows: int, at_once: None) -> None:
    torch.manual_seed(0)
    assert check(torch.randn(5000, 64), torch.randn(rows, 64)) <= 4 * rows


def test_a_token_that_bytes_show_too_small_beside_one_that_they_show_too_large(at_once: None) -> None:
    """Both by as much as the rounding of weights can do, and the first wins by a hundredth of that."""
    torch.manual_seed(0)
    fraction = torch.rand(32) * 0.9 - 0.45
    fraction[:2] = 0
    whole = torch.randint(-100, 100, (32,)).float()
    whole[:2] = torch.tensor([127, 0])  # so that the steps are one
    weight = torch.stack([whole + fraction, whole - fraction])
    weight[1, 1] = 100
    hidden = fraction / fraction.norm()
    hidden[1] = 1.99 * fraction.norm() / 100
    check(weight, hidden[None])


def test_a_token_that_the_digits_of_the_inputs_show_too_small(at_once: None) -> None:
    """All weights are whole numbers of steps, and all inputs but the largest lie just below the middle of two digits."""
    torch.manual_seed(0)
    sign, width = torch.randint(0, 2, (64,)) * 2.0 - 1, 64
    hidden = sign * (torch.randint(0, 40, (width,)) + (torch.randint(0, 40, (width,)) + 0.49) / 126)
    hidden[0] = 63
    weight = torch.zeros(100, width)
    weight[7] = sign
    weight[7, 0] = 0
    weight[9, 0] = (weight[7] @ hidden - 0.02) / 63
    assert check(weight, hidden[None]) < 100


def test_of_tokens_that_tie_when_rounded_the_first_stays(at_once: None) -> None:
    weight, hidden = torch.tensor([[127.0, 26.0], [127.0, 51.0]]), torch.tensor([[1.0, 1 / 256]])
    assert check(weight.bfloat16(), hidden.bfloat16()) == 2  # 127.1 and 127.2 are both 127


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_inputs_that_tell_nothing_exclude_nothing(bad: float, at_once: None) -> None:
    hidden = torch.randn(2, 16)
    hidden[1] = bad
    logits = GreedyHead(head_of(torch.randn(50, 16))).logits(hidden)
    assert logits is not None and not logits.isneginf().all(0).any()


def test_a_head_that_leaves_too_many_is_given_up(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_head, "_MAX_PART", 1 / 32)
    calls: list[int] = []
    own = greedy_head.candidates
    monkeypatch.setattr(greedy_head, "_scripted_candidates", lambda *args: calls.append(1) or own(*args))
    monkeypatch.setattr(greedy_head._scripted_candidates, "list_of", list, raising=False)
    flat = head_of(torch.ones(64, 16))  # all logits are one
    for _ in range(3):
        generation = GreedyHead(flat)
        assert [generation.logits(torch.randn(1, 16)) for _ in range(4)] == [None] * 4
    assert len(calls) == 3


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), 1e30])
def test_damaged_weights_are_left_to_the_whole_head(damage: float, at_once: None) -> None:
    weight = torch.randn(50, 16)
    weight[3, 4] = damage
    assert GreedyHead(head_of(weight)).logits(torch.randn(1, 16)) is None
    assert GreedyHead(head_of(torch.randn(50, 16) * 1e-22)).logits(torch.randn(1, 16)) is None


def test_bytes_are_kept_until_the_weights_change(at_once: None) -> None:
    hidden = torch.randn(1, 16)
    weight = torch.zeros(50, 16)
    weight[:9] = -hidden * torch.rand(9, 1)  # the others are larger
    head = head_of(weight)
    first = GreedyHead(head)
    first.logits(hidden)
    again = GreedyHead(head)
    again.logits(hidden)
    assert again._bytes is first._bytes is not None
    fewer = GreedyHead(head, 9)
    fewer_logits = fewer.logits(hidden)
    assert fewer_logits is not None and fewer_logits.shape == (1, 9) and fewer._bytes is first._bytes
    with torch.no_grad():
        head.weight.data[[7, 8]] = head.weight.data[[8, 7]].clone()  # which torch does not count as a change
        assert GreedyHead(head).logits(hidden) is None
        assert GreedyHead(head).logits(hidden) is not None
        generation = GreedyHead(head)
        assert generation.logits(hidden) is not None
        head.weight[7] = 100 * hidden[0]
        assert generation.logits(hidden) is None
    assert GreedyHead(head).logits(hidden) is None
    changed = GreedyHead(head).logits(hidden)
    assert changed is not None and int(changed.argmax()) == 7
    kept = weakref.ref(head)
    del head, first, again, fewer, generation
    gc.collect()
    assert kept() is None


def test_it_waits_until_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_head, "_MIN_BYTES", 0)
    monkeypatch.setattr(greedy_head, "_MAX_PART", 1)
    head, hidden = head_of(torch.randn(50, 16)), torch.randn(1, 16)
    wait, max_rows = greedy_head._PAYS[torch.float32]
    short = GreedyHead(head)
    assert all(short.logits(hidden) is None for _ in range(wait - 1))
    longer = GreedyHead(head)  # the next generation goes on counting
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
    with monkeypatch.context() as patch:
        patch.setattr("gpt2.quantization.kernels._ENGINES", ("onednn", "qnnpack"))  # which lack the operator
        assert not GreedyHead.fits(large)
    monkeypatch.setattr(torch.ops, "quantized", object())
    assert not GreedyHead.fits(large)


def test_under_autocast_and_in_short_texts_it_is_not_used(small_model: GPT2, at_once: None, counted: list[int]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        small_model.generate(torch.tensor([[1]]), max_new_tokens=3)
    assert not counted
    small_model.generate(torch.tensor([[1]]), max_new_tokens=3)
    assert counted
    counted.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2.generation.decoder.MIN_STEPS", greedy_head.MIN_STEPS)
        small_model.generate(torch.tensor([[1]]), max_new_tokens=greedy_head.MIN_STEPS - 1)
    assert not counted


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_ids_are_those_of_all_logits(
    dtype: torch.dtype, small_config: GPT2Config, at_once: None, counted: list[int]
) -> None:
    """With padding, past the context, and where rows end and leave the batch."""
    model = random_model(small_config, seed=3).to(dtype)
    ids = torch.randint(0, 300, (3, 7))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] * 6 + [1]])
    n = small_config.n_positions + 9
    for rows in (1, 3):
        given_ids, given_mask = ids[:rows], mask[:rows]
        fast = model.generate(given_ids, attention_mask=given_mask, max_new_tokens=n)
        assert counted
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GreedyHead, "fits", staticmethod(lambda head: False))
            assert torch.equal(fast, model.generate(given_ids, attention_mask=given_mask, max_new_tokens=n))
        counted.clear()


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "seed": 1}, {"repetition_penalty": 1.5}, {"num_beams": 2}, {"speculate": True}],
    ids=lambda options: next(iter(options)),
)
def test_other_ways_to_choose_are_as_without(
    options: dict[str, object], small_model: GPT2, at_once: None, counted: list[int]
) -> None:
    prompt = torch.tensor([[5, 6, 5, 6, 5, 6]])
    ids = small_model.generate(prompt, max_new_tokens=12, **options)
    assert bool(counted) == ("speculate" in options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GreedyHead, "fits", staticmethod(lambda head: False))
        assert torch.equal(ids, small_model.generate(prompt, max_new_tokens=12, **options))


def test_log_probabilities_come_from_all_logits(small_model: GPT2, at_once: None, counted: list[int]) -> None:
    config = GenerationConfig(max_new_tokens=5)
    rows = start(small_model, [[1, 2, 3]], config, logprobs=True)
    for _ in decode(Batch(small_model), rows):
        pass
    assert not counted
    assert all(-20 < value < 0 for value in rows[0].logprobs)


def test_only_ids_of_the_tokenizer_are_looked_at(small_model: GPT2, at_once: None, counted: list[int]) -> None:
    config = GenerationConfig(max_new_tokens=8, stop_at_eot=False)
    rows = start(small_model, [[1, 2, 3]], config)
    for _ in decode(Batch(small_model, vocab_size=9), rows):
        pass
    assert counted and max(rows[0].ids) < 9
