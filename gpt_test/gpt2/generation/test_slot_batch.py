"""SlotBatch: rows that join, have different options and end at any time get the ids that each gets alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.fast import plan
from gpt2.fast.limits import FastLimits, GreedyHeadLimits
from gpt2.generation.batch import Batch
from gpt2.generation.decoder import Decoder
from gpt2.generation.loop import decode, start
from gpt2.generation.prefix_cache import Prefix, PrefixCache
from gpt2.generation.row import Row
from gpt2.generation.slot_batch import SlotBatch, Slots, batch_of
from gpt2.generation.steps import GreedyTokens, OneToken, Prefill, Step, VerifyDrafts
from gpt2.kv_cache import KVCache
from gpt2.quantization.quantize import quantize_int8
from gpt_config import CheckpointError, GenerationConfig, InputError
from gpt_test.conftest import random_model, repetitive_model
from gpt_test.gpt2.generation.test_batch import CONFIG, Arrival, alone, arrivals_strategy, read, rows_of

N_SLOTS = 10


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_model(CONFIG)


def run(batch: SlotBatch, arrivals: Sequence[Arrival], groups: Sequence[list[Row]], prompt: AlongPrompt) -> None:
    arrival_of = {id(row): arrival for group, arrival in zip(groups, arrivals, strict=True) for row in group}
    n_steps = 0
    while batch.rows or n_steps <= 30:
        for group, arrival in zip(groups, arrivals, strict=True):
            if arrival.step == n_steps:
                batch.admit(group)
        prompt.join(batch)
        for advanced in batch.step():
            for row in advanced:
                read(row, arrival_of[id(row)])
        n_steps += 1


class AlongPrompt:
    """A prompt of which each step takes a part of `size` tokens along, if it can."""

    def __init__(self, model: GPT2, size: int) -> None:
        self.model, self.size, self.n_taken = model, size, 0
        self.ids = [1 + place % 7 for place in range(model.config.n_positions)]
        self.cache = KVCache(model.config, dtype=plan.cache_dtype(model))

    def join(self, batch: SlotBatch) -> None:
        done = self.cache.length
        if self.size and done < len(self.ids):
            self.n_taken += batch.take_along(self.ids[done : done + self.size], self.cache)

    def check(self) -> None:
        wanted = KVCache(self.model.config)
        with torch.inference_mode():
            self.model(torch.tensor([self.ids[: self.cache.length]]), kv_cache=wanted) if self.cache.length else None
        for ours, theirs in zip(self.cache.layers, wanted.layers, strict=True):
            torch.testing.assert_close(ours[:, :, :, : self.cache.length], theirs[:, :, :, : self.cache.length])


def check_arrivals(model: GPT2, keep_texts: bool, size: int, arrivals: list[Arrival]) -> None:
    """In float32. Windows slide at different times, and with `keep_texts` beginnings are copied from earlier rows."""
    arrivals = [arrival for arrival in arrivals if "num_beams" not in arrival.options]
    slots = Slots(model, N_SLOTS)
    for layer in slots.layers:
        layer.fill_(float("nan"))  # what was not written must not matter
    batch = SlotBatch(model, slots, prefix_cache=PrefixCache(min_tokens=2, keep_texts=keep_texts))
    groups = [rows_of(model, arrival) for arrival in arrivals]
    prompt = AlongPrompt(model, size)
    run(batch, arrivals, groups, prompt)
    prompt.check()
    for group, arrival in zip(groups, arrivals, strict=True):
        assert [(row.ids, row.finish_reason) for row in group] == alone(model, arrival)
        for row in group:
            assert len(row.logprobs) == (len(row.ids) if row.wants_logprobs else 0)
    assert sorted(slots.free) == list(range(N_SLOTS))


@given(st.booleans(), st.sampled_from([0, 1, 5, 70]), arrivals_strategy)
@settings(max_examples=20)
def test_rows_that_join_and_leave_get_the_ids_that_they_get_alone(
    model: GPT2, keep_texts: bool, size: int, arrivals: list[Arrival]
) -> None:
    check_arrivals(model, keep_texts, size, arrivals)


def test_a_step_takes_part_of_a_prompt_along(model: GPT2) -> None:
    """While rows run and none begins. The rows get one token with each part, also a greedy row alone."""
    slots, steps = Slots(model, 2), list[Step]()
    batch, prompt = SlotBatch(model, slots, on_step=steps.append), AlongPrompt(model, 5)
    assert not batch.take_along([1, 2], prompt.cache)  # no row runs
    rows = start(model, [[1, 2]], GenerationConfig(max_new_tokens=30, stop_at_eot=False))
    batch.admit(rows)
    assert not batch.take_along([1, 2], prompt.cache)  # the row begins first
    list(batch.step())
    for n in range(3):
        prompt.join(batch)
        list(batch.step())
        assert steps[-1] == OneToken(1) and prompt.cache.length == 5 * (n + 1) and len(rows[0].ids) == n + 2
    prompt.check()
    list(batch.step())
    assert prompt.cache.length == 15 and isinstance(steps[-1], GreedyTokens)
    assert batch.take_along([1], prompt.cache)
    rows[0].finish_reason = "stop"
    list(batch.step())
    assert prompt.cache.length == 15 and not batch.take_along([1], prompt.cache)


@pytest.mark.slow
@given(st.booleans(), st.sampled_from([0, 1, 5, 70]), arrivals_strategy)
@settings(max_examples=500)
def test_many_rows_that_join_and_leave(model: GPT2, keep_texts: bool, size: int, arrivals: list[Arrival]) -> None:
    check_arrivals(model, keep_texts, size, arrivals)


def finished(batch: Batch, rows: list[Row]) -> list[list[int]]:
    for _ in decode(batch, rows):
        pass
    return [row.ids for row in rows]


def rows(model: GPT2, prompts: Sequence[list[int]], **options: Any) -> list[Row]:
    return start(model, prompts, GenerationConfig(**{"max_new_tokens": 12, "stop_at_eot": False, **options}))


PROMPTS = [[1, 2, 3], [4] * 9, [5, 6]]


def test_the_steps(model: GPT2) -> None:
    """Several rows take one pass over the weights; one row takes the fast steps of a batch with one row."""
    seen: list[Step] = []
    repetitive = repetitive_model(CONFIG)
    fast = FastLimits(costs_of_drafts=(0.0, 0.0))
    batch = SlotBatch(repetitive, Slots(repetitive, 3), on_step=seen.append, fast=fast)
    batch.admit(rows(repetitive, PROMPTS[:2], max_new_tokens=4))
    batch.admit(rows(repetitive, [[1, 2, 1, 2, 1, 2]], max_new_tokens=16, speculate=True, repetition_penalty=0.5))
    while batch.rows:
        list(batch.step())
    assert seen[:4] == [Prefill(3), OneToken(3), OneToken(3), OneToken(3)]
    assert any(isinstance(step, VerifyDrafts) for step in seen[4:])
    seen.clear()
    finished(batch, rows(repetitive, PROMPTS[:1]))
    assert any(isinstance(step, GreedyTokens) for step in seen)


def refuse(*_: Any) -> torch.Tensor:
    raise InputError("no token is allowed")


@pytest.mark.parametrize("fault", [None, "NaN", "no token"])
def test_one_row_begins_in_the_step_of_the_others(model: GPT2, fault: str | None) -> None:
    """If it has few tokens to compute. A fault of the new row leaves the others as they were before the step."""
    options = [{"max_new_tokens": 9}, {"max_new_tokens": 20}, {"max_new_tokens": 12, "do_sample": True, "seed": 3}]
    wanted = [
        finished(Batch(model), rows(model, [prompt], **some))[0] for prompt, some in zip(PROMPTS, options, strict=True)
    ]
    seen, slots = list[Step](), Slots(model, 3)
    batch = SlotBatch(model, slots, on_step=seen.append, fast=FastLimits(rows_to_join=len(PROMPTS[2])))
    first, second, new = (rows(model, [prompt], **some)[0] for prompt, some in zip(PROMPTS, options, strict=True))
    batch.admit([first, second])
    for _ in range(3):
        list(batch.step())
    batch.admit([new])
    if fault == "NaN":
        new.beginning = Prefix(
            (PROMPTS[2][0],), [torch.full_like(layer[:, 0, :, :1], float("nan")) for layer in slots.layers]
        )
    elif fault:
        new.processors = (refuse,)
    if fault:
        with pytest.raises(CheckpointError if fault == "NaN" else InputError):
            list(batch.step())
        assert [len(row.ids) for row in (first, second, new)] == [3, 3, 0]
        new.finish_reason = "stop"
    else:
        assert list(batch.step()) == [[first, second, new]]
        assert seen[-1] == Prefill(1, n_running=2) and [len(row.ids) for row in (first, second, new)] == [4, 4, 1]
    while batch.rows:
        list(batch.step())
    assert [first.ids, second.ids] == wanted[:2] and (fault or new.ids == wanted[2])
    assert sorted(slots.free) == [0, 1, 2]


def test_a_beginning_is_not_computed_again(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9 tokens, 7 were computed before. When the windows slide, all of them is computed, with the same ids."""
    prompt, options = [4, 1, 5, 9, 2, 6, 5, 3, 5], {"max_new_tokens": CONFIG.n_positions}
    wanted = finished(Batch(model), rows(model, [prompt], **options))
    cache = KVCache(CONFIG, max_length=7)
    with torch.inference_mode():
        model.hidden_states(torch.tensor([prompt[:7]]), kv_cache=cache)
    n_tokens: list[int] = []
    compute = plan.DecodePlan.hidden_states

    def counted(self: Any, input_ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        n_tokens.append(input_ids.shape[1])
        return compute(self, input_ids, **rest)

    monkeypatch.setattr(plan.DecodePlan, "hidden_states", counted)
    found = rows(model, [prompt] * 2, **options)
    for row in found:
        row.beginning = Prefix.of_row(cache, 0, tuple(prompt[:7]), 7)
    assert finished(SlotBatch(model, Slots(model, 2)), found) == wanted * 2
    assert n_tokens[0] == 2 and max(n_tokens) > 2 and all(row.beginning is None for row in found)


@pytest.mark.parametrize("rows_for_python", [64, 2])
def test_short_prompts_are_computed_together(model: GPT2, monkeypatch: pytest.MonkeyPatch, rows_for_python: int) -> None:
    """At most 16 tokens in a pass. What shares a beginning of 4 tokens comes after it, and a longer prompt is alone."""
    prompts = [[4] * 9, [5, 6], [4, 4, 4, 4, 1], [7] * 10, [8, 9], list(range(20, 40)), [5, 6]]
    wanted = [finished(Batch(model), rows(model, [prompt]))[0] for prompt in prompts]
    passes: list[list[int]] = []
    together, one = plan.DecodePlan.hidden_states_of_slots, plan.DecodePlan.hidden_states

    def counted(self: Any, texts: Sequence[Sequence[int]], *rest: Any) -> torch.Tensor:
        passes.append([len(text) for text in texts])
        return together(self, texts, *rest)

    def counted_alone(self: Any, input_ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        passes.append([input_ids.shape[1]])
        return one(self, input_ids, **rest)

    monkeypatch.setattr(plan.DecodePlan, "hidden_states_of_slots", counted)
    monkeypatch.setattr(plan.DecodePlan, "hidden_states", counted_alone)
    fast = FastLimits(prompt_rows_together=16, rows_for_python=rows_for_python)
    batch = SlotBatch(model, Slots(model, 8), prefix_cache=PrefixCache(min_tokens=4), fast=fast)
    assert finished(batch, rows(model, prompts)) == wanted
    assert passes[:5] == [[9, 2], [5, 10], [20], [2], [1] * 7]


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "head", "python"])
def test_other_kinds_of_models(model: GPT2, kind: str) -> None:
    """Of rows that are equal, the ids are those of each row alone; in float32 with a greedy head, of all rows."""
    limits = FastLimits(use_torchscript=kind != "python")
    if kind == "head":
        every = GreedyHeadLimits(min_bytes=0, min_steps=1, pays={torch.float32: (0, 16)}, max_part=1)
        limits = FastLimits(greedy_head=every)
    one = copy.deepcopy(model)
    if kind == "int8":
        quantize_int8(one)
    elif kind == "bfloat16":
        one = one.to(torch.bfloat16)
    prompts = PROMPTS if kind in ("head", "python") else [PROMPTS[0]] * 3
    for options in ({}, {"do_sample": True, "seed": 1}):
        wanted = [finished(Batch(one, vocab_size=37), rows(one, [prompt], **options))[0] for prompt in prompts]
        batch = SlotBatch(one, Slots(one, 3), vocab_size=37, fast=limits)
        assert finished(batch, rows(one, prompts, **options)) == wanted
    # Two rows that slide at different times.
    sliding = [[1, 2, 3], [4] * 9] if kind in ("head", "python") else [[1, 2, 3]] * 2
    wanted = [finished(Batch(one, vocab_size=37), rows(one, [prompt], max_new_tokens=30))[0] for prompt in sliding]
    batch = SlotBatch(one, Slots(one, 3), vocab_size=37, fast=limits)
    assert finished(batch, rows(one, sliding, max_new_tokens=30)) == wanted


@pytest.mark.parametrize("failing", ["pass", "choice"])
def test_rows_go_on_after_an_error(model: GPT2, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    wanted = [finished(Batch(model), rows(model, [prompt]))[0] for prompt in PROMPTS]
    slots, n_calls = Slots(model, 3), 0
    batch, found = SlotBatch(model, slots), rows(model, PROMPTS)
    owner, name = (plan.DecodePlan, "hidden_states_of_slots") if failing == "pass" else (SlotBatch, "_choose")
    original = getattr(owner, name)

    def fail_once(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        result = original(*arguments)
        if n_calls == 3:
            raise RuntimeError("out of luck")
        return result

    monkeypatch.setattr(owner, name, fail_once)
    with pytest.raises(RuntimeError, match="out of luck"):
        finished(batch, found)
    while batch.rows:
        list(batch.step())
    assert [row.ids for row in found] == wanted and len(slots.free) == 3


def test_more_rows_than_slots(model: GPT2) -> None:
    slots = Slots(model, 2)
    batch = SlotBatch(model, slots)
    with pytest.raises(InputError, match="3 rows begin and 2 slots are free: admit fewer rows"):
        finished(batch, rows(model, PROMPTS))
    assert len(slots.free) == 2
    batch.rows[0].finish_reason = "stop"
    while batch.rows:
        list(batch.step())
    assert len(slots.free) == 2


def test_a_damaged_weight_is_reported_and_slots_are_given_back() -> None:
    damaged = random_model(CONFIG)
    with torch.no_grad():
        damaged.wpe.weight[12] = float("nan")
    slots = Slots(damaged, 3)
    batch = SlotBatch(damaged, slots)
    with pytest.raises(CheckpointError, match="NaN"):
        finished(batch, rows(damaged, PROMPTS))
    assert not slots.free
    batch.close()
    assert len(slots.free) == 3 and not batch.rows


def test_what_fits(model: GPT2) -> None:
    assert SlotBatch.fits(model)
    hooked = copy.deepcopy(model)
    hooked.h[0].register_forward_hook(lambda *_: None)
    assert not SlotBatch.fits(hooked)


def test_equal_prompts_are_computed_once(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows may get different numbers of tokens, and slide."""
    options = [{"max_new_tokens": n, "seed": n, "do_sample": True} for n in (2, 30, 12)]
    wanted = [finished(Batch(model), rows(model, [[4] * 9], **each))[0] for each in options]
    n_calls, original = 0, Decoder.next_logits

    def counted(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        return original(*arguments)

    monkeypatch.setattr(Decoder, "next_logits", counted)
    batch = SlotBatch(model, Slots(model, 3))
    found = [row for each in options for row in rows(model, [[4] * 9], **each)]
    batch.admit(found)
    list(batch.step())
    assert n_calls == 1 and all(len(row.ids) == 1 for row in found)
    assert finished(batch, []) == [] and [row.ids for row in found] == wanted


def test_a_hook_that_is_added_while_rows_run(model: GPT2) -> None:
    """Rows that begin later have the hook's results, one by one; those that run keep theirs."""
    one = copy.deepcopy(model)
    batch, first = SlotBatch(one, Slots(one, 3)), rows(one, PROMPTS[:2])
    wanted = [finished(Batch(one), rows(one, [prompt]))[0] for prompt in PROMPTS]
    batch.admit(first)
    list(batch.step())
    one.h[0].register_forward_hook(lambda *_: None)
    last = rows(one, PROMPTS[2:])
    finished(batch, last)
    assert [row.ids for row in first + last] == wanted


@pytest.mark.parametrize("free, kind", [(10**9, SlotBatch), (100_000, Batch), (None, Batch)])
def test_slots_for_many_prompts_take_half_of_the_free_memory_at_most(
    model: GPT2, monkeypatch: pytest.MonkeyPatch, free: int | None, kind: type[Batch]
) -> None:
    monkeypatch.setattr("gpt2.generation.slot_batch.free_memory", lambda device: free)
    batch = batch_of(model, 8, draft_model=model)
    assert type(batch) is kind
    mixed = rows(model, PROMPTS[:1], speculate=True) + rows(model, [PROMPTS[1]], num_beams=2)
    wanted = [finished(Batch(model), [copy.deepcopy(row)])[0] for row in mixed]
    assert finished(batch, mixed) == wanted
