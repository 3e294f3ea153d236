"""Greedy steps that follow each other without a look at them: the tokens that one look at a time would choose."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.fast.greedy_head import GreedyHead
from gpt2.generation import decoder
from gpt2.generation.decoder import Decoder
from gpt2.generation.loop import decode, start
from gpt2.generation.speculation import Speculation
from gpt2.generation.window import Window
from gpt2.quantization.quantize import quantize_int8
from gpt_config import CheckpointError, GenerationConfig, GPT2Config, InputError
from gpt_test.conftest import random_model

CONFIG = GPT2Config(vocab_size=60, n_positions=24, n_embd=32, n_layer=2, n_head=2)
DTYPES = ("float64", "float32", "bfloat16", "int8")


def model_in(dtype: str) -> GPT2:
    model = random_model(CONFIG)
    return quantize_int8(model) if dtype == "int8" else model.to(getattr(torch, dtype))


def greedy_ids(
    model: GPT2, prompt: list[int], n: int, *, several: bool, vocab_size: int = 60, eot: int | None = None
) -> list[int]:
    window = Window(list(prompt), CONFIG.n_positions)
    steps = Decoder(model, [window], n, only_largest=True, vocab_size=vocab_size)
    found: list[int] = []
    while len(found) < n and eot not in found:
        tokens = steps.greedy_tokens(eot) if several else []
        tokens = tokens or [int(steps.next_logits()[0, :vocab_size].argmax())]
        window.ids += tokens
        found += tokens
        assert steps._cache is not None and steps._cache.length in (len(window.view) - 1, CONFIG.n_positions)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@given(prompt=st.lists(st.integers(0, 59), min_size=1, max_size=30), n=st.integers(1, 60), data=st.data())
@settings(max_examples=15)
def test_they_are_those_of_single_steps(dtype: str, prompt: list[int], n: int, data: st.DataObject) -> None:
    """However many at once, past the context, in part of the vocabulary, up to an end-of-text token anywhere."""
    model, vocab_size = model_in(dtype), data.draw(st.integers(1, 60))
    expected = greedy_ids(model, prompt, n, several=False, vocab_size=vocab_size)
    eot = data.draw(st.none() | st.sampled_from(expected))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_MAX_AT_ONCE", data.draw(st.integers(1, 9)))
        patch.setattr(decoder, "_SECONDS_AT_ONCE", 99)
        found = greedy_ids(model, prompt, n, several=True, vocab_size=vocab_size, eot=eot)
    assert found == expected[: len(found)]
    assert len(found) == (expected.index(eot) + 1 if eot is not None else n)


def test_several_come_at_once_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would compare single steps with themselves."""
    monkeypatch.setattr(decoder, "_SECONDS_AT_ONCE", 99)
    model, window = model_in("float32"), Window([1, 2, 3], CONFIG.n_positions)

    def steps(**options: bool) -> list[int]:
        window.ids[:] = [1, 2, 3]
        made = Decoder(model, [window], 20, **{"only_largest": True, **options})
        assert made.greedy_tokens(None) == []  # there is nothing computed yet
        window.ids.append(int(made.next_logits().argmax()))
        window.ids += made.greedy_tokens(None)
        return made.greedy_tokens(None)

    assert len(steps()) == decoder._MAX_AT_ONCE
    assert steps(only_largest=False) == steps(use_cache=False) == []


def test_padding_and_other_windows_are_left_to_single_steps() -> None:
    windows = [Window(ids, CONFIG.n_positions) for ids in ([1], [2, 3])]
    both = Decoder(model_in("float32"), windows, 9, only_largest=True)
    for _ in range(2):
        for window, token in zip(windows, both.next_logits().argmax(-1).tolist(), strict=True):
            window.ids.append(token)
        assert both.greedy_tokens(None) == []
    both.select([0])  # which is padded
    assert both.greedy_tokens(None) == []


def test_what_is_sound_comes_before_damage_is_said() -> None:
    model = model_in("float32")
    sound = greedy_ids(model, [1], 20, several=False)
    with torch.no_grad():
        model.wpe.weight[12] = torch.nan  # of the thirteenth token
    window = Window([1], CONFIG.n_positions)
    steps = Decoder(model, [window], 20, only_largest=True)
    with pytest.raises(CheckpointError, match="NaN"):
        while True:
            window.ids += steps.greedy_tokens(None) or [int(steps.next_logits().argmax())]
    assert window.ids == [1, *sound[:12]]


@pytest.mark.parametrize("end", [5, None])
def test_in_int8_damage_behind_the_end_does_no_harm(end: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel raises at NaN: the tokens before come all the same, and so does the error if the text goes on."""
    monkeypatch.setattr(decoder, "_SECONDS_AT_ONCE", 99)
    model, config = model_in("int8"), GenerationConfig(max_new_tokens=20, stop_at_eot=False)
    with torch.no_grad():
        model.wpe.weight[12] = torch.nan  # of the thirteenth token
    sound = greedy_ids(model_in("int8"), [1], 12, several=False)
    rows = start(model, [[1]], config)
    with contextlib.nullcontext() if end else pytest.raises((RuntimeError, CheckpointError)):
        for _ in decode(model, rows, config):
            if len(rows[0].ids) == end:
                rows[0].finish_reason = "stop"
    assert rows[0].ids == sound[:end]


def test_a_model_that_becomes_another_on_the_way_is_said_in_a_line() -> None:
    model, config = model_in("float32"), GenerationConfig(max_new_tokens=20, stop_at_eot=False)
    rows = start(model, [[1]], config)
    with pytest.raises(InputError, match=r"the cache is torch\.float32"):
        for _ in decode(model, rows, config):
            model.double()


def test_a_clock_that_stands_still_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 1.0)
    assert len(greedy_ids(model_in("float32"), [1], 20, several=True)) == 20


def test_they_end_where_a_greedy_head_spares_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """They count as steps that it waits for, and then it is asked."""
    monkeypatch.setattr("gpt2.fast.greedy_head._MIN_BYTES", 1)
    monkeypatch.setattr("gpt2.fast.greedy_head._PAYS", {torch.float32: (12, 16)})
    monkeypatch.setattr("gpt2.fast.greedy_head._MAX_PART", 1)
    monkeypatch.setattr(decoder, "_SECONDS_AT_ONCE", 99)
    is_spared: list[bool] = []
    logits = GreedyHead.logits

    def recorded(head: GreedyHead, hidden_states: torch.Tensor) -> torch.Tensor | None:
        found = logits(head, hidden_states)
        is_spared.append(found is not None)
        return found

    monkeypatch.setattr(GreedyHead, "logits", recorded)
    expected = greedy_ids(model_in("float32"), [1], 22, several=False)
    assert is_spared == [False] * 12 + [True] * 9  # the first of the 22 tokens comes of the prompt
    is_spared.clear()
    assert greedy_ids(model_in("float32"), [1], 22, several=True) == expected
    assert is_spared == [True] * 9


def test_a_reader_ends_a_row_among_tokens_that_came_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_SECONDS_AT_ONCE", 99)
    model, config = model_in("float32"), GenerationConfig(max_new_tokens=20, stop_at_eot=False)
    rows = start(model, [[1, 2, 3]], config)
    n_reads = 0
    for _ in decode(model, rows, config):
        n_reads += 1
        if n_reads == 6:  # the second token of the second call, which gives more
            rows[0].finish_reason = "stop"
    assert n_reads == len(rows[0].ids) == 6


def test_guesses_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy steps without a look at them would take their place for ever."""
    n_drafts: list[int] = []
    monkeypatch.setattr(Speculation, "draft", lambda self, ids, room, generator: [7][:room])
    monkeypatch.setattr(Speculation, "verified", lambda self, drafts, taken: n_drafts.append(drafts))
    model, ids = model_in("float32"), torch.tensor([[1, 2, 3]])
    plain = model.generate(ids, max_new_tokens=9, stop_at_eot=False)
    assert torch.equal(model.generate(ids, max_new_tokens=9, stop_at_eot=False, speculate=True), plain)
    assert len(n_drafts) >= 4


def test_where_there_are_no_guesses_several_tokens_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_SECONDS_AT_ONCE", 99)
    monkeypatch.setattr(decoder, "_MAX_AT_ONCE", 8)
    n_calls: list[int] = []
    monkeypatch.setattr(Speculation, "draft", lambda self, ids, room, generator: n_calls.append(len(ids)) or [])
    model_in("float32").generate(torch.tensor([[1, 2, 3]]), max_new_tokens=18, stop_at_eot=False, speculate=True)
    assert [after - before for before, after in itertools.pairwise(n_calls)] == [1, 1, 8]  # and the rest of the 18
