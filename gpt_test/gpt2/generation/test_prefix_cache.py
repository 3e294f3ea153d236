"""PrefixCache: common beginnings are computed once, and the ids are those that are computed without it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.fast.plan import DecodePlan
from gpt2.generation.batch import Batch
from gpt2.generation.loop import decode, start
from gpt2.generation.prefix_cache import PrefixCache, n_common
from gpt2.generation.row import Row
from gpt2.quantization.quantize import quantize_int8
from gpt_config import GenerationConfig, GPT2Config, GPT2Error
from gpt_test.conftest import random_model
from gpt_test.gpt2.fast.watching import calls_of

CONFIG = GPT2Config(vocab_size=40, n_positions=24, n_embd=24, n_layer=2, n_head=3, eos_token_id=39, bos_token_id=38)
BYTES_PER_TOKEN = 2 * CONFIG.n_layer * CONFIG.n_embd * 4


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_model(CONFIG)


def continued(model: GPT2, prompts: Sequence[Sequence[int]], batch: Batch, **options: object) -> list[Row]:
    rows = start(model, prompts, GenerationConfig(**{"max_new_tokens": 6, "stop_at_eot": False, **options}))
    for _ in decode(batch, rows):
        pass
    return rows


def ids_of(rows: Sequence[Row]) -> list[list[int]]:
    return [row.ids for row in rows]


def alone(model: GPT2, prompt: Sequence[int], **options: object) -> list[list[int]]:
    return ids_of(continued(model, [prompt], Batch(model, use_cache=False), **options))


ends_of_prompts = st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=5)


@given(
    beginning=st.lists(st.integers(0, 37), max_size=20),
    groups=st.lists(ends_of_prompts, min_size=1, max_size=3),
    sampled=st.booleans(),
    max_new_tokens=st.integers(1, 12),
    max_tokens=st.sampled_from([0, 5, 30, 1000]),
    min_tokens=st.sampled_from([1, 4]),
    keep_texts=st.booleans(),
)
@settings(max_examples=25)
@pytest.mark.filterwarnings("ignore:a prompt has")
def test_the_ids_are_those_of_each_prompt_alone(
    model: GPT2,
    beginning: list[int],
    groups: list[list[list[int]]],
    sampled: bool,
    max_new_tokens: int,
    max_tokens: int,
    min_tokens: int,
    keep_texts: bool,
) -> None:
    """Greedy and sampled, for prompts of unequal lengths, equal ones, beginnings of others, windows that slide."""
    cache = PrefixCache(max_tokens * BYTES_PER_TOKEN, min_tokens=min_tokens, keep_texts=keep_texts)
    options = {"do_sample": sampled, "seed": 3, "max_new_tokens": max_new_tokens}
    for ends in groups:
        prompts = [beginning + end or [5] for end in ends]
        rows = continued(model, prompts, Batch(model, prefix_cache=cache), **options)
        assert ids_of(rows) == ids_of(continued(model, prompts, Batch(model, use_cache=False), **options))
        assert cache.n_bytes <= cache.max_bytes


def shapes_computed_by(model: GPT2, batch: Batch, prompts: Sequence[Sequence[int]], **options: object) -> list[tuple]:
    """The shapes of the ids of each forward pass that computes several tokens per row."""
    with calls_of(DecodePlan.hidden_states) as calls:
        continued(model, prompts, batch, **{"max_new_tokens": 1, **options})
    return [tuple(call.arguments["input_ids"].shape) for call in calls]


HEAD = list(range(1, 13))


def test_a_common_beginning_is_computed_once(model: GPT2) -> None:
    cache = PrefixCache(min_tokens=2)
    prompts = [[*HEAD, 20], [*HEAD, 21, 22], [*HEAD, 23, 24]]
    assert shapes_computed_by(model, Batch(model, prefix_cache=cache), prompts) == [(1, 12), (3, 2)]
    assert cache.n_reused == 11 + 12 + 12 - 12  # those copied, less those computed for it
    assert shapes_computed_by(model, Batch(model, prefix_cache=cache), [[*HEAD, 30, 31, 32]]) == [(1, 3)]
    assert shapes_computed_by(model, Batch(model, prefix_cache=cache), [HEAD]) == [(1, 1)]


def test_beginnings_within_beginnings_are_computed_once(model: GPT2) -> None:
    first, second = [*HEAD, 30, 31, 32, 33], [*HEAD, 34, 35, 36, 37]
    prompts = [[*head, end] for head in (first, second) for end in range(20, 26)]
    assert shapes_computed_by(model, Batch(model, prefix_cache=PrefixCache(min_tokens=2)), prompts) == [
        (1, 12), (2, 4), (12, 1),
    ]  # fmt: skip


def test_the_second_prompt_with_the_same_beginning_is_noticed(model: GPT2) -> None:
    """Prompts that come one after another, as to a server: the beginning is kept from the second on."""
    cache = PrefixCache(min_tokens=2)
    shapes = [shapes_computed_by(model, Batch(model, prefix_cache=cache), [[*HEAD, end]]) for end in (20, 21, 22)]
    assert shapes == [[(1, 13)], [(1, 13)], [(1, 1)]]
    assert cache.n_bytes == 12 * BYTES_PER_TOKEN


def test_complete_texts_are_kept_if_asked_for(model: GPT2) -> None:
    cache = PrefixCache(min_tokens=2, keep_texts=True)
    [row] = continued(model, [HEAD], Batch(model, prefix_cache=cache))
    longer = [*HEAD, *row.ids, 1, 2]  # the last of the row's ids was not computed
    assert shapes_computed_by(model, Batch(model, prefix_cache=cache), [longer]) == [(1, 3)]
    assert cache.n_bytes == (len(longer)) * BYTES_PER_TOKEN  # one text: the earlier ones are its beginnings


def test_the_texts_used_last_stay(model: GPT2) -> None:
    cache = PrefixCache(24 * BYTES_PER_TOKEN, min_tokens=2, keep_texts=True)
    for first in (1, 2, 1, 3):  # each text has 10 tokens: there is memory for two
        continued(model, [[first] * 10], Batch(model, prefix_cache=cache), max_new_tokens=1)
    assert [cache.find([first] * 10)[0] for first in (1, 2, 3)] == [10, 0, 10]


def test_of_a_text_that_is_too_long_the_beginning_is_kept(model: GPT2) -> None:
    cache = PrefixCache(5 * BYTES_PER_TOKEN, keep_texts=True)
    continued(model, [HEAD], Batch(model, prefix_cache=cache))
    assert (cache.find(HEAD)[0], cache.n_bytes) == (5, 5 * BYTES_PER_TOKEN)


def test_changed_weights_empty_the_cache() -> None:
    model, cache = random_model(CONFIG), PrefixCache(min_tokens=2, keep_texts=True)
    continued(model, [HEAD], Batch(model, prefix_cache=cache))
    with torch.no_grad():
        model.h[0].attn.c_attn.weight.mul_(1.5)
    rows = continued(model, [HEAD], Batch(model, prefix_cache=cache))
    assert ids_of(rows) == alone(model, HEAD) and cache.n_reused == 0
    cache.clear()
    assert cache.n_bytes == 0


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8", "hooked"])
def test_it_is_not_used_where_it_could_change_tokens(kind: str) -> None:
    """In few bits the rounding of two parts differs from that of one; a hook may look at the whole prompt."""
    model = random_model(CONFIG)
    if kind == "hooked":
        model.h[0].register_forward_hook(lambda *_: None)
    else:
        model = quantize_int8(model) if kind == "int8" else model.to(getattr(torch, kind))
    cache = PrefixCache(min_tokens=1, keep_texts=True)
    prompts = [[*HEAD, 20], [*HEAD, 21]]
    found = ids_of(continued(model, prompts, Batch(model, prefix_cache=cache)))
    without = Batch(model, prefix_cache=PrefixCache(min_tokens=sys.maxsize))
    assert found == ids_of(continued(model, prompts, without))
    assert (cache.n_reused, cache.n_bytes) == (0, 0)


def test_rows_that_join_use_it(model: GPT2) -> None:
    cache = PrefixCache(min_tokens=2)
    batch = Batch(model, prefix_cache=cache)
    options = GenerationConfig(max_new_tokens=6, stop_at_eot=False)
    rows = start(model, [[*HEAD, 20], [*HEAD, 21, 22, 23], [*HEAD, 24]], options)
    batch.admit(rows[:2])
    list(batch.step())
    n_reused = cache.n_reused
    batch.admit(rows[2:])
    while batch.rows:
        list(batch.step())
    assert cache.n_reused == n_reused + len(HEAD)
    assert ids_of(rows) == [alone(model, row.prompt_ids)[0] for row in rows]


@given(first=st.lists(st.integers(0, 2)), second=st.lists(st.integers(0, 2)))
def test_the_common_beginning(first: list[int], second: list[int]) -> None:
    pairs = list(zip(first, second, strict=False))
    assert n_common(first, second) == next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))


@pytest.mark.parametrize("wrong", [{"max_bytes": -1}, {"max_bytes": 1.5}, {"min_tokens": 0}])
def test_wrong_limits_are_refused(wrong: dict) -> None:
    with pytest.raises(GPT2Error, match=next(iter(wrong))):
        PrefixCache(**wrong)
