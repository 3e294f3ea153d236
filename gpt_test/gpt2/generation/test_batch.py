"""Batch: rows that join, have different options and end at any time get the ids that each gets alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.fast.limits import FastLimits
from gpt2.generation.batch import Batch
from gpt2.generation.loop import decode, start
from gpt2.generation.row import Row
from gpt2.generation.steps import BeamSearch, GreedyTokens, OneToken, Prefill, Step, StepCounts, VerifyDrafts
from gpt_config import CheckpointError, GenerationConfig, GPT2Config, InputError
from gpt_test.conftest import random_model, repetitive_model

CONFIG = GPT2Config(vocab_size=40, n_positions=24, n_embd=24, n_layer=2, n_head=3, eos_token_id=39, bos_token_id=38)


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_model(CONFIG)


@dataclass
class Arrival:
    """Rows of one prompt, the step before which they are admitted, and the number of tokens after which a reader ends them.

    The reader is the code that iterates over the batch's steps.
    """

    step: int
    prompt: list[int]
    options: dict
    reader_ends_at: int | None


options_strategy = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(0, 40),
        "do_sample": st.booleans(),
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([None, 1, 5]),
        "top_p": st.sampled_from([None, 0.7]),
        "min_p": st.sampled_from([None, 0.2]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.8]),
        "num_return_sequences": st.sampled_from([1, 1, 2]),
        "speculate": st.booleans(),
        "stop_at_eot": st.booleans(),
        "seed": st.integers(0, 9),
    }
) | st.fixed_dictionaries({"num_beams": st.just(2), "max_new_tokens": st.integers(0, 9), "seed": st.just(0)})
arrivals_strategy = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 30),
        prompt=st.lists(st.integers(0, 37), min_size=1, max_size=30),
        options=options_strategy,
        reader_ends_at=st.none() | st.integers(1, 20),
    ),
    min_size=1,
    max_size=5,
)


def rows_of(model: GPT2, arrival: Arrival) -> list[Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some prompts are longer than the context on purpose
        return start(model, [arrival.prompt], GenerationConfig(**arrival.options), logprobs=len(arrival.prompt) % 2 == 0)


def read(row: Row, arrival: Arrival) -> None:
    if len(row.ids) == arrival.reader_ends_at and row.finish_reason is None:
        row.finish_reason = "stop"


def alone(model: GPT2, arrival: Arrival) -> list[tuple[list[int], str | None]]:
    """Return the ids and finish reason that each row gets in a batch of its own, without a cache and without drafts."""
    rows = rows_of(model, Arrival(0, arrival.prompt, {**arrival.options, "speculate": False}, arrival.reader_ends_at))
    groups = [rows] if arrival.options.get("num_beams") else [[row] for row in rows]
    for group in groups:
        for advanced in decode(Batch(model, use_cache=False), group):
            for row in advanced:
                read(row, arrival)
    return [(row.ids, row.finish_reason) for row in rows]


@given(arrivals=arrivals_strategy, max_prefill_tokens=st.sampled_from([None, 1, 30]))
@settings(max_examples=60)
def test_rows_that_join_and_leave_get_the_ids_that_they_get_alone(
    model: GPT2, arrivals: list[Arrival], max_prefill_tokens: int | None
) -> None:
    """In float32. Prompts and texts are longer than the context, so that windows slide at different times."""
    batch = Batch(model, max_prefill_tokens=max_prefill_tokens)
    groups = [rows_of(model, arrival) for arrival in arrivals]
    arrival_of = {id(row): arrival for group, arrival in zip(groups, arrivals, strict=True) for row in group}
    n_steps = 0
    while batch.rows or n_steps <= 30:
        for group, arrival in zip(groups, arrivals, strict=True):
            if arrival.step == n_steps:
                batch.admit(group)
        for advanced in batch.step():
            for row in advanced:
                read(row, arrival_of[id(row)])
        n_steps += 1
    for group, arrival in zip(groups, arrivals, strict=True):
        assert [(row.ids, row.finish_reason) for row in group] == alone(model, arrival)
        for row in group:
            assert len(row.logprobs) == (len(row.ids) if row.wants_logprobs else 0)


@pytest.mark.parametrize("prompts", [([1] * 4, [2] * 15), ([1] * 15, [2] * 4)], ids=["longer", "shorter"])
def test_a_row_joins_a_running_batch_without_a_second_prefill_of_it(model: GPT2, prompts: tuple[list[int], ...]) -> None:
    """Otherwise the test above would also pass for a batch that starts again at each arrival."""
    n_read: list[int] = []
    hook = model.wte.register_forward_hook(lambda _, inputs, __: n_read.append(inputs[0].numel()))
    try:
        batch = Batch(model)
        first, second = (start(model, [prompt], GenerationConfig(max_new_tokens=6, stop_at_eot=False)) for prompt in prompts)
        batch.admit(first)
        for _ in range(3):
            list(batch.step())
        batch.admit(second)
        while batch.rows:
            list(batch.step())
    finally:
        hook.remove()
    # The first prompt; two steps of its row; the second prompt; three steps of both rows, after which the first has ended;
    # two steps of the second row.
    assert n_read == [len(prompts[0]), 1, 1, len(prompts[1]), 2, 2, 2, 1, 1]


def test_each_kind_of_step_is_reported_before_it_runs(model: GPT2) -> None:
    repeating, reported = repetitive_model(CONFIG), []
    counts = StepCounts()

    def on_step(step: Step) -> None:
        reported.append(step)
        counts(step)

    options = {"max_new_tokens": 20, "stop_at_eot": False}
    for chosen in ({"speculate": True, "repetition_penalty": 0.5}, {}, {"num_beams": 2, "max_new_tokens": 3}):
        rows = start(repeating, [[1, 2, 1, 2, 1, 2]], GenerationConfig(**{**options, **chosen}))
        fast = FastLimits(seconds_at_once=99)
        for _ in decode(Batch(repeating, on_step=on_step, fast=fast), rows):
            pass
    rows = start(repeating, [[1, 2], [3]], GenerationConfig(max_new_tokens=2, stop_at_eot=False))
    for _ in decode(Batch(repeating, on_step=on_step), rows):
        pass
    assert {type(step) for step in reported} == {Prefill, VerifyDrafts, GreedyTokens, OneToken, BeamSearch}
    assert reported[-2:] == [Prefill(n_rows=2), OneToken(n_rows=2)]
    assert sum(counts.by_name.values()) == len(reported) and "prefill 3" in str(counts)


def test_rows_continue_after_an_interrupted_step(model: GPT2) -> None:
    """After Ctrl-C inside a layer, the cache has its earlier length and the next step gives the expected token."""
    config = GenerationConfig(max_new_tokens=12, do_sample=True, seed=1, stop_at_eot=False)
    expected = start(model, [[1, 2, 3], [4]], config)
    for _ in decode(Batch(model), expected):
        pass
    rows, batch = start(model, [[1, 2, 3], [4]], config), Batch(model)
    interrupted = []

    def interrupt(*_: object) -> None:
        if len(rows[0].ids) == 5 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    hook = model.h[1].mlp.register_forward_hook(interrupt)
    try:
        batch.admit(rows)
        with pytest.raises(KeyboardInterrupt):
            while batch.rows:
                list(batch.step())
        while batch.rows:
            list(batch.step())
    finally:
        hook.remove()
    assert interrupted and [row.ids for row in rows] == [row.ids for row in expected]


def test_a_step_can_be_closed_between_its_tokens(model: GPT2) -> None:
    """The next step continues there; no token is lost or repeated."""
    config = GenerationConfig(max_new_tokens=30, stop_at_eot=False)
    rows, batch = start(model, [[1, 2, 3]], config), Batch(model, fast=FastLimits(seconds_at_once=99))
    batch.admit(rows)
    n_closed = 0
    while batch.rows:
        step = batch.step()
        next(step, None)
        step.close()
        n_closed += 1
    assert n_closed == 30 and rows[0].ids == alone(model, Arrival(0, [1, 2, 3], vars_of(config), None))[0][0]


def vars_of(config: GenerationConfig) -> dict:
    return {"max_new_tokens": config.max_new_tokens, "stop_at_eot": config.stop_at_eot}


def test_a_damaged_weight_that_one_row_uses_is_reported() -> None:
    model = random_model(CONFIG)
    with torch.no_grad():
        model.wte.weight[7] = torch.nan
    batch = Batch(model)
    batch.admit(start(model, [[1, 7]], GenerationConfig(max_new_tokens=3)))
    with pytest.raises(CheckpointError, match="NaN"):
        list(batch.step())


def alone_ids(model: GPT2, prompt: list[int], **options: object) -> list[int]:
    [row] = start(model, [prompt], GenerationConfig(stop_at_eot=False, **options))
    for _ in decode(Batch(model), [row]):
        pass
    return row.ids


@pytest.mark.parametrize("n_calls", range(1, 12))
def test_an_error_after_the_forward_pass_changes_no_ids(model: GPT2, n_calls: int) -> None:
    """A hook on the model raises after the cache has advanced. The window slides during the test."""
    expected = alone_ids(model, [3, 4, 5] * 7, max_new_tokens=10)
    [row], batch, calls = (
        start(model, [[3, 4, 5] * 7], GenerationConfig(max_new_tokens=10, stop_at_eot=False)),
        Batch(model),
        [],
    )

    def fail_once(*_: object) -> None:
        calls.append(1)
        if len(calls) == n_calls:
            raise ZeroDivisionError

    hook = model.register_forward_hook(fail_once)
    try:
        batch.admit([row])
        while batch.rows:
            try:
                list(batch.step())
            except ZeroDivisionError:
                continue
    finally:
        hook.remove()
    assert row.ids == expected


def test_rows_still_wait_after_a_failed_prefill(model: GPT2) -> None:
    damaged = random_model(CONFIG)
    with torch.no_grad():
        damaged.wpe.weight[6] = torch.nan
    good, bad = start(damaged, [[3], [7] * 8], GenerationConfig(max_new_tokens=3, stop_at_eot=False))
    batch = Batch(damaged)
    batch.admit([good, bad])
    with pytest.raises(CheckpointError, match="NaN"):
        list(batch.step())
    assert batch.rows == [good, bad]
    bad.finish_reason = "stop"  # the reader ends this row, and the other continues
    while batch.rows:
        list(batch.step())
    assert len(good.ids) == 3 and bad.ids == []


def test_a_step_must_be_exhausted_or_closed_before_the_next(model: GPT2) -> None:
    rows, batch = start(model, [[1, 2, 3]], GenerationConfig(max_new_tokens=30)), Batch(model)
    batch.admit(rows)
    step = batch.step()
    next(step)
    with pytest.raises(InputError, match="a step of this batch is not finished: exhaust or close its iterator"):
        next(batch.step())
    step.close()
    list(batch.step())


def test_a_row_cannot_be_admitted_twice(model: GPT2) -> None:
    [row], batch = start(model, [[1]], GenerationConfig()), Batch(model)
    batch.admit([row])
    with pytest.raises(InputError, match="already in this batch"):
        batch.admit([row])


def test_beams_of_one_prompt_share_a_search_if_admitted_separately(model: GPT2) -> None:
    config = GenerationConfig(num_beams=2, num_return_sequences=2, max_new_tokens=5, stop_at_eot=False)
    expected, separate = start(model, [[3, 4]], config), start(model, [[3, 4]], config)
    for _ in decode(Batch(model), expected):
        pass
    batch = Batch(model)
    batch.admit(separate[:1])
    batch.admit(start(model, [[9]], config))
    batch.admit(separate[1:])
    while batch.rows:
        list(batch.step())
    assert [row.ids for row in separate] == [row.ids for row in expected]


def test_rows_of_beam_search_may_have_consecutive_indices(model: GPT2) -> None:
    """lm_eval numbers its rows, one for each prompt, in this way."""
    config = GenerationConfig(num_beams=2, max_new_tokens=5, stop_at_eot=False)
    expected, rows = start(model, [[3, 4], [5]], config), start(model, [[3, 4], [5]], config)
    for _ in decode(Batch(model), expected):
        pass
    for number, row in enumerate(rows):
        row.index = number
    for _ in decode(Batch(model), rows):
        pass
    assert [row.ids for row in rows] == [row.ids for row in expected]


def test_rows_may_be_admitted_and_ended_while_empty_rows_are_yielded(model: GPT2) -> None:
    nothing = GenerationConfig(max_new_tokens=0)
    running, waiting = start(model, [[1], [2]], GenerationConfig(max_new_tokens=4, stop_at_eot=False))
    first, second, third = (start(model, [[5]], nothing)[0] for _ in range(3))
    third.finish_reason = "stop"  # before its first step
    batch = Batch(model)
    batch.admit([running])
    list(batch.step())
    batch.admit([first, third])
    for advanced in batch.step():
        assert advanced == [first]
        batch.admit([second, waiting])
        running.finish_reason = "stop"
    while batch.rows:
        list(batch.step())
    assert (len(running.ids), second.ids, third.finish_reason, len(waiting.ids)) == (1, [], "stop", 4)


def test_rows_join_without_a_cache_after_a_padded_start(model: GPT2) -> None:
    batch = Batch(model, use_cache=False)
    first = start(model, [[3, 4], [5]], GenerationConfig(max_new_tokens=9, stop_at_eot=False))
    later = [start(model, [[n]], GenerationConfig(max_new_tokens=6, stop_at_eot=False))[0] for n in (6, 7)]
    batch.admit(first)
    list(batch.step())
    batch.admit(later[:1])
    list(batch.step())
    first[0].finish_reason = "stop"
    batch.admit(later[1:])
    while batch.rows:
        list(batch.step())
    assert [row.ids for row in later] == [alone_ids(model, [n], max_new_tokens=6) for n in (6, 7)]
