"""Several greedy tokens that are computed in one call equal those of single steps."""

from __future__ import annotations

import contextlib
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.fast.greedy_head import GreedyHead
from gpt2.fast.limits import FastLimits, GreedyHeadLimits
from gpt2.fast.plan import cache_dtype
from gpt2.generation.batch import Batch
from gpt2.generation.decoder import Decoder
from gpt2.generation.loop import decode, start
from gpt2.generation.slot_batch import SlotBatch, Slots
from gpt2.generation.speculation import PromptLookup, Speculation
from gpt2.generation.window import Window
from gpt2.quantization.quantize import quantize_int8
from gpt_config import CheckpointError, GenerationConfig, GPT2Config, InputError
from gpt_test.conftest import random_model
from gpt_test.gpt2.fast.watching import calls_of

CONFIG = GPT2Config(vocab_size=60, n_positions=24, n_embd=32, n_layer=2, n_head=2)
DTYPES = ("float64", "float32", "bfloat16", "int8")


def model_in(dtype: str) -> GPT2:
    model = random_model(CONFIG)
    return quantize_int8(model) if dtype == "int8" else model.to(getattr(torch, dtype))


# As many tokens in one call as `max_at_once` allows, however long they take.
AS_MANY_AS_ALLOWED = FastLimits(seconds_at_once=99)


def several_at_once(steps: Decoder, eot: int | None = None) -> list[int]:
    """Return the greedy tokens of one call; an empty list if a single step is required."""
    n_tokens = steps.reserve_greedy_steps()
    return steps.greedy_tokens(n_tokens, () if eot is None else (eot,)).tokens if n_tokens else []


def greedy_ids(
    model: GPT2,
    prompt: list[int],
    n: int,
    *,
    several: bool,
    vocab_size: int = 60,
    eot: int | None = None,
    fast: FastLimits = AS_MANY_AS_ALLOWED,
) -> list[int]:
    window = Window(list(prompt), CONFIG.n_positions)
    steps = Decoder(model, [window], n, only_largest=True, vocab_size=vocab_size, fast=fast)
    found: list[int] = []
    while len(found) < n and eot not in found:
        tokens = several_at_once(steps, eot) if several else []
        tokens = tokens or [int(steps.next_logits()[0, :vocab_size].argmax())]
        window.ids += tokens
        found += tokens
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@given(prompt=st.lists(st.integers(0, 59), min_size=1, max_size=30), n=st.integers(1, 60), data=st.data())
@settings(max_examples=15)
def test_several_tokens_equal_those_of_single_steps(dtype: str, prompt: list[int], n: int, data: st.DataObject) -> None:
    """For any number per call, past the context, in part of the vocabulary, and with an end-of-text token anywhere."""
    model, vocab_size = model_in(dtype), data.draw(st.integers(1, 60))
    expected = greedy_ids(model, prompt, n, several=False, vocab_size=vocab_size)
    eot = data.draw(st.none() | st.sampled_from(expected))
    fast = FastLimits(seconds_at_once=99, max_at_once=data.draw(st.integers(1, 9)))
    found = greedy_ids(model, prompt, n, several=True, vocab_size=vocab_size, eot=eot, fast=fast)
    assert found == expected[: len(found)]
    assert len(found) == (expected.index(eot) + 1 if eot is not None else n)


def test_several_tokens_are_computed_in_one_call_if_possible() -> None:
    """Otherwise the test above would compare single steps with themselves."""
    model, window = model_in("float32"), Window([1, 2, 3], CONFIG.n_positions)

    def steps(**options: bool) -> list[int]:
        window.ids[:] = [1, 2, 3]
        made = Decoder(model, [window], 20, **{"only_largest": True, "fast": AS_MANY_AS_ALLOWED, **options})
        assert several_at_once(made) == []  # the prompt is not prefilled yet
        window.ids.append(int(made.next_logits().argmax()))
        window.ids += several_at_once(made)
        return several_at_once(made)

    assert len(steps()) == AS_MANY_AS_ALLOWED.max_at_once
    assert steps(only_largest=False) == steps(use_cache=False) == []


def test_several_windows_and_padding_need_single_steps() -> None:
    windows = [Window(ids, CONFIG.n_positions) for ids in ([1], [2, 3])]
    both = Decoder(model_in("float32"), windows, 9, only_largest=True)
    for _ in range(2):
        for window, token in zip(windows, both.next_logits().argmax(-1).tolist(), strict=True):
            window.ids.append(token)
        assert several_at_once(both) == []
    both.select([0])  # this row is padded
    assert several_at_once(both) == []


def test_tokens_before_the_first_nan_are_returned() -> None:
    model = model_in("float32")
    sound = greedy_ids(model, [1], 20, several=False)
    with torch.no_grad():
        model.wpe.weight[12] = torch.nan  # the position of the thirteenth token
    window = Window([1], CONFIG.n_positions)
    steps = Decoder(model, [window], 20, only_largest=True, fast=AS_MANY_AS_ALLOWED)
    with pytest.raises(CheckpointError, match="NaN"):
        while True:
            window.ids += several_at_once(steps) or [int(steps.next_logits().argmax())]
    assert window.ids == [1, *sound[:12]]


@pytest.mark.parametrize("end", [5, None])
def test_in_int8_a_nan_after_the_end_of_the_text_does_no_harm(end: int | None) -> None:
    """The int8 kernel raises at NaN. The tokens before it are returned; the error is raised only if the text continues."""
    model, config = model_in("int8"), GenerationConfig(max_new_tokens=20, stop_at_eot=False)
    with torch.no_grad():
        model.wpe.weight[12] = torch.nan  # the position of the thirteenth token
    sound = greedy_ids(model_in("int8"), [1], 12, several=False)
    rows = start(model, [[1]], config)
    with contextlib.nullcontext() if end else pytest.raises((RuntimeError, CheckpointError)):
        for _ in decode(Batch(model, fast=AS_MANY_AS_ALLOWED), rows):
            if len(rows[0].ids) == end:
                rows[0].finish_reason = "stop"
    assert rows[0].ids == sound[:end]


@pytest.mark.parametrize("old, new", [("float32", "float64"), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_model_that_changes_its_dtype_while_decoding_is_refused(old: str, new: str) -> None:
    model, config = model_in(old), GenerationConfig(max_new_tokens=20, stop_at_eot=False)
    rows = start(model, [[1]], config)
    with pytest.raises(InputError, match=r"the cache is torch\.|converted from torch"):
        for _ in decode(Batch(model), rows):
            model.to(getattr(torch, new))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("has_amx", [False, True])
def test_keys_and_values_in_16_bits_are_kept_in_the_fastest_dtype(
    dtype: str, has_amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was changed computes with its own cache, in its own dtype, also in the middle of a text."""
    monkeypatch.setattr("gpt2.fast.plan.has_matrix_units", lambda: has_amx)
    model = model_in(dtype)
    assert cache_dtype(model) == (torch.bfloat16 if has_amx and dtype == "bfloat16" else torch.float32)
    config = GenerationConfig(max_new_tokens=20, stop_at_eot=False)
    for batch in (Batch(model), SlotBatch(model, Slots(model, 1))):
        rows = start(model, [[1]], config)
        for n, _ in enumerate(decode(batch, rows)):
            if n == 5:
                handle = model.h[0].register_forward_hook(lambda *_: None)
        assert len(rows[0].ids) == 20
        handle.remove()
    model.h[0].register_forward_hook(lambda *_: None)
    assert cache_dtype(model) == getattr(torch, dtype)


def test_a_clock_that_does_not_advance_does_no_harm() -> None:
    assert len(greedy_ids(model_in("float32"), [1], 20, several=True, fast=FastLimits(clock=lambda: 1.0))) == 20


def test_the_greedy_head_takes_over_when_it_is_faster() -> None:
    """Tokens of one call count toward the steps after which the greedy head is used; then single steps use it."""
    head = GreedyHeadLimits(min_bytes=1, pays={torch.float32: (12, 16)}, max_part=1)
    fast = FastLimits(greedy_head=head, seconds_at_once=99)
    with calls_of(GreedyHead.logits) as calls:
        expected = greedy_ids(model_in("float32"), [1], 22, several=False, fast=fast)
    # The prefill gives the first of the 22 tokens.
    assert [call.returned is not None for call in calls] == [False] * 12 + [True] * 9
    with calls_of(GreedyHead.logits) as calls:
        assert greedy_ids(model_in("float32"), [1], 22, several=True, fast=fast) == expected
    assert [call.returned is not None for call in calls] == [True] * 9


def test_a_row_can_be_ended_between_tokens_of_one_call() -> None:
    model, config = model_in("float32"), GenerationConfig(max_new_tokens=20, stop_at_eot=False)
    rows = start(model, [[1, 2, 3]], config)
    n_reads = 0
    for _ in decode(Batch(model, fast=AS_MANY_AS_ALLOWED), rows):
        n_reads += 1
        if n_reads == 6:  # the second token of the second call, which gives more
            rows[0].finish_reason = "stop"
    assert n_reads == len(rows[0].ids) == 6


class Rehearsed(Speculation):
    """Speculation with the drafts of the test; it records the length of the text at each call and the drafts verified."""

    def __init__(self, drafts: list[int]) -> None:
        super().__init__(PromptLookup(CONFIG.n_positions), (0.0, 0.0))
        self.drafts, self.lengths, self.n_drafts = drafts, [], []

    def draft(self, ids: list[int], room: int, generator: random.Random) -> list[int]:
        self.lengths.append(len(ids))
        return self.drafts[:room]

    def verified(self, n_drafts: int, n_taken: int) -> None:
        self.n_drafts.append(n_drafts)


def rehearsed(drafts: list[int], n: int, fast: FastLimits = AS_MANY_AS_ALLOWED) -> tuple[list[int], Rehearsed]:
    """Return `n` greedy ids with these drafts at every step, and the record of the calls."""
    model, speculation = model_in("float32"), Rehearsed(drafts)
    config = GenerationConfig(max_new_tokens=n, stop_at_eot=False, speculate=True)
    rows = start(model, [[1, 2, 3]], config)
    for _ in decode(Batch(model, make_speculation=lambda *_: speculation, fast=fast), rows):
        pass
    return rows[0].ids, speculation


def test_drafts_have_priority_over_several_greedy_tokens() -> None:
    """Otherwise a greedy row would never get drafts."""
    ids, speculation = rehearsed([7], 9)
    assert ids == greedy_ids(model_in("float32"), [1, 2, 3], 9, several=False)
    assert len(speculation.n_drafts) >= 4


def test_without_drafts_several_tokens_are_computed_in_one_call() -> None:
    _, speculation = rehearsed([], 18, FastLimits(seconds_at_once=99, max_at_once=8))
    lengths = itertools.pairwise(speculation.lengths)
    assert [after - before for before, after in lengths] == [1, 1, 8]  # the last call gives the rest of the 18 tokens
