"""Completions: text, streams and stop strings."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import GPT2, complete, stream
from gpt2.generation.completion import Request, complete_in_batches, complete_requests, stream_batch
from gpt2.generation.row import Row
from gpt2.generation.steps import OneToken, Prefill, Step
from gpt2.generation.text_stream import TextStream
from gpt_config import ConfigError, GenerationConfig, GPT2Config, InputTypeError
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model

OPTIONS = {"do_sample": True, "max_new_tokens": 60, "temperature": 1.2}


def unstopped_text(model: GPT2, tokenizer: GPT2Tokenizer, seed: int) -> str:
    return complete(model, tokenizer, "The cat", seed=seed, **OPTIONS)[0].text


@given(seed=st.integers(0, 20), data=st.data())
@settings(max_examples=20)
def test_the_text_is_cut_before_the_stop_string_that_ends_first(small_model, small_tokenizer, seed: int, data) -> None:
    """The stop strings are parts of the text itself, so they span tokens, overlap and begin anywhere."""
    whole = unstopped_text(small_model, small_tokenizer, seed)
    places = data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 6)), min_size=1, max_size=3))
    stop = tuple({whole[at : at + length] for at, length in places} | {"never in it \x00"})
    completion = complete(small_model, small_tokenizer, "The cat", seed=seed, stop=stop, **OPTIONS)[0]
    assert completion.finish_reason == "stop"
    _, cut = min((whole.find(text) + len(text), whole.find(text)) for text in stop if text in whole)
    assert completion.text == whole[:cut]
    assert "".join(stream(small_model, small_tokenizer, "The cat", seed=seed, stop=stop, **OPTIONS)) == completion.text


@given(seed=st.integers(0, 20))
@settings(max_examples=15)
def test_a_stop_string_that_does_not_occur_changes_nothing(small_model, small_tokenizer, seed: int) -> None:
    whole = unstopped_text(small_model, small_tokenizer, seed)
    stop = (whole[-3:] + "never", whole[:2] + "never")
    pieces = list(stream(small_model, small_tokenizer, "The cat", seed=seed, stop=stop, **OPTIONS))
    assert "".join(pieces) == whole


def test_of_two_stop_strings_in_one_token_the_one_that_ends_first_counts(openai_tokenizer: GPT2Tokenizer) -> None:
    """The result therefore does not depend on how the text is cut into tokens."""
    for stop, text in ((("gazed", "az"), " g"), (("azed", "gaz"), " "), (("zed", "ed", "gazed!"), " ga")):
        stream = TextStream(openai_tokenizer, stop)
        assert stream.read(Row([1], GenerationConfig(), 9, ids=openai_tokenizer.encode(" gazed"), logprobs=[0.0])) == text


def test_streamed_pieces_join_to_the_text(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    pieces = list(stream(small_model, small_tokenizer, "The cat", seed=3, **OPTIONS))
    assert "".join(pieces) == unstopped_text(small_model, small_tokenizer, 3)
    assert len(pieces) > 20 and all(pieces)


def test_no_piece_contains_half_a_character(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    """A random model generates many invalid bytes. The streamed text must equal the text of all ids decoded at once."""
    for seed in range(5):
        completion = complete(small_model, small_tokenizer, "é", seed=seed, **{**OPTIONS, "temperature": 5.0})[0]
        ids = completion.ids[:-1] if completion.finish_reason == "eot" else completion.ids
        assert completion.text == small_tokenizer.decode(ids)


def test_completions_are_in_the_order_of_the_prompts(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    prompts = ["The cat", "", "A boat came home with a fish for every cat", "x"]
    together = complete(small_model, small_tokenizer, prompts, seed=1, num_return_sequences=2, **OPTIONS)
    assert [(c.prompt, c.index) for c in together] == [(prompt, index) for prompt in prompts for index in (0, 1)]
    for each in together:
        alone = complete(small_model, small_tokenizer, each.prompt, seed=1, num_return_sequences=2, **OPTIONS)
        assert alone[each.index].ids == each.ids
        assert alone[each.index].text == each.text


def test_the_seed_of_a_completion_reproduces_it(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    first = complete(small_model, small_tokenizer, "The cat", **OPTIONS)[0]
    again = complete(small_model, small_tokenizer, "The cat", seed=first.seed, **OPTIONS)[0]
    assert (first.ids, first.text, first.logprobs) == (again.ids, again.text, again.logprobs)
    assert len(first.logprobs) == len(first.ids)
    assert 0 < first.seconds_to_first_token <= first.seconds


def test_finish_reasons(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    reasons = {complete(small_model, small_tokenizer, "a", seed=seed, **{**OPTIONS, "temperature": 4.0})[0].finish_reason
               for seed in range(20)}  # fmt: skip
    assert reasons == {"eot", "length"}
    ended = complete(small_model, small_tokenizer, "a", max_new_tokens=0)[0]
    assert (ended.text, ended.ids, ended.finish_reason) == ("", [], "length")


def test_beam_search_gives_text_and_obeys_stop_strings(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    beams = complete(small_model, small_tokenizer, "The cat", num_beams=3, num_return_sequences=3, max_new_tokens=20)
    assert len(beams) == 3 and all(len(beam.logprobs) == len(beam.ids) for beam in beams)
    means = [sum(beam.logprobs) / len(beam.ids) for beam in beams]
    assert all(a >= b - 1e-6 for a, b in pairwise(means))
    stop = beams[0].text[3:5]
    stopped = complete(small_model, small_tokenizer, "The cat", num_beams=3, max_new_tokens=20, stop=(stop,))[0]
    assert stop not in stopped.text and len(stopped.ids) == len(stopped.logprobs)
    if stopped.finish_reason == "stop":
        assert stop in small_tokenizer.decode(stopped.ids)


def test_a_special_token_in_a_prompt_is_ordinary_text(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    completion = complete(small_model, small_tokenizer, "<|endoftext|>", max_new_tokens=1)[0]
    assert small_tokenizer.eot_token_id not in completion.prompt_ids


def test_special_tokens_of_a_prompt_are_read_if_they_are_allowed(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    prompt, options = "The<|endoftext|> cat", {"max_new_tokens": 1, "allowed_special": "all"}
    expected = small_tokenizer.encode(prompt, allowed_special="all")
    assert small_tokenizer.eot_token_id in expected
    assert complete(small_model, small_tokenizer, prompt, **options)[0].prompt_ids == expected
    batches = complete_in_batches(small_model, small_tokenizer, [prompt], batch_size=1, **options)
    assert next(batches)[0].prompt_ids == expected
    assert list(stream(small_model, small_tokenizer, prompt, seed=0, **options)) == [
        completion.text
        for completion in complete(small_model, small_tokenizer, prompt, seed=0, **options)
        if completion.text
    ]


def test_a_prompt_begins_with_the_bos_token_if_the_tokenizer_says_so(small_model, small_tokenizer: GPT2Tokenizer) -> None:
    eot = small_tokenizer.eot_token_id
    tokenizer = GPT2Tokenizer(replace(small_tokenizer.vocabulary, first_ids=(eot,)))
    assert complete(small_model, tokenizer, "The cat", max_new_tokens=1)[0].prompt_ids == [
        eot,
        *small_tokenizer.encode("The cat"),
    ]


def test_rows_advance_together(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    events = stream_batch(small_model, small_tokenizer, ["a", "b"], max_new_tokens=3, stop_at_eot=False)
    assert [row for row, _, _ in events] == [0, 1] * 3


@pytest.mark.parametrize("prompts", [5, [5.0], [[5.0]], b"x", [b"x"], None, {"a": 1}, {"a"}, [None], [["a"]], [[True]]])
def test_prompts_that_are_not_text_are_refused(small_model, small_tokenizer, prompts) -> None:
    with pytest.raises(InputTypeError):
        complete(small_model, small_tokenizer, prompts)


def test_a_vocabulary_padded_beyond_the_ids_of_the_tokenizer(small_tokenizer: GPT2Tokenizer) -> None:
    """For example, 50,304 embedding rows for 50,257 ids: no decoding method chooses an id that the tokenizer lacks."""
    model = random_model(GPT2Config(vocab_size=3000, n_positions=40, n_embd=24, n_layer=1, n_head=2))
    for options in ({}, {"do_sample": True, "temperature": 9.0, "seed": 0}, {"num_beams": 4}, {"repetition_penalty": 1.5}):
        completion = complete(model, small_tokenizer, "The cat", max_new_tokens=30, **options)[0]
        assert max(completion.ids) < small_tokenizer.vocab_size


@pytest.mark.parametrize("prompt", ["Once", [5, 6, 7], (5, 6, 7), np.array([5, 6, 7]), torch.tensor([5, 6, 7])], ids=str)
def test_one_prompt_is_a_text_or_ids(small_model: GPT2, small_tokenizer: GPT2Tokenizer, prompt) -> None:
    ids = small_tokenizer.encode(prompt) if isinstance(prompt, str) else [5, 6, 7]
    for prompts in (prompt, [prompt], iter([prompt])):
        [made] = complete(small_model, small_tokenizer, prompts, max_new_tokens=2)
        assert made.prompt_ids == ids and made.prompt == small_tokenizer.decode(ids)
    [[batched]] = complete_in_batches(small_model, small_tokenizer, prompt, batch_size=2, max_new_tokens=2)
    assert batched.ids == made.ids
    assert "".join(stream(small_model, small_tokenizer, prompt, max_new_tokens=2)) == made.text


def test_prompts_of_a_generator_are_read_as_they_are_needed(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    read: list[int] = []

    def prompts():
        for n in range(1000):
            read.append(n)
            yield "a" * (n % 5)

    many = complete_in_batches(small_model, small_tokenizer, prompts(), batch_size=2, max_new_tokens=1)
    assert next(many)[0].prompt == "" and len(read) < 100
    assert complete(small_model, small_tokenizer, (text for text in ("a", "b")), max_new_tokens=1)[1].prompt == "b"
    assert complete(small_model, small_tokenizer, [], max_new_tokens=1) == []


def test_bad_words_are_excluded_alone_and_after_a_space(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    options = {"max_new_tokens": 30, "do_sample": True, "seed": 3}
    word = complete(small_model, small_tokenizer, "The cat", **options)[0].text.split()[0]
    made = complete(small_model, small_tokenizer, "The cat", bad_words=[word], **options)[0]
    for text in (word, f" {word}"):
        banned = small_tokenizer.encode(text)
        assert all(made.ids[at : at + len(banned)] != banned for at in range(len(made.ids)))


@given(n=st.integers(1, 400), do_sample=st.booleans(), wants_cut=st.booleans())
@settings(max_examples=10)
def test_top_logprobs_are_the_best_of_each_step(small_model, small_tokenizer, n, do_sample, wants_cut) -> None:
    options = {"max_new_tokens": 6, "do_sample": do_sample, "seed": 1}
    stop = (complete(small_model, small_tokenizer, "The cat", **options)[0].text[2:3],) if wants_cut else ()
    made = complete(small_model, small_tokenizer, "The cat", top_logprobs=n, stop=stop, **options)[0]
    assert len(made.top_logprobs) == len(made.ids) == len(made.logprobs)
    for step, (token, logprob, listed) in enumerate(zip(made.ids, made.logprobs, made.top_logprobs, strict=True)):
        logits = small_model(torch.tensor([[*made.prompt_ids, *made.ids[:step]]]))[0, -1]
        expected = logits.double().log_softmax(-1).topk(min(n, small_tokenizer.vocab_size)).values.tolist()
        assert [number for _, number in listed] == pytest.approx(expected, abs=1e-5)
        if token in dict(listed):
            assert dict(listed)[token] == pytest.approx(logprob)


@pytest.mark.filterwarnings("ignore:a prompt has")
@given(lengths=st.lists(st.integers(0, 30), max_size=12), batch_size=st.integers(1, 5), n=st.integers(1, 2))
@settings(max_examples=15)
def test_completions_of_many_prompts_are_in_order_for_any_batch_size(
    small_model, small_tokenizer, lengths: list[int], batch_size: int, n: int
) -> None:
    prompts = [f"{place} the cat" + " the dog" * length for place, length in enumerate(lengths)]
    options = {"max_new_tokens": 4, "do_sample": True, "seed": 5, "num_return_sequences": n}
    many = list(complete_in_batches(small_model, small_tokenizer, prompts, batch_size=batch_size, **options))
    assert [[item.prompt for item in group] for group in many] == [[prompt] * n for prompt in prompts]
    assert [[item.index for item in group] for group in many] == [list(range(n))] * len(prompts)
    for prompt, group in zip(prompts, many, strict=True):
        assert [item.ids for item in group] == [
            item.ids for item in complete(small_model, small_tokenizer, prompt, **options)
        ]


def test_a_row_that_ends_makes_place_for_the_next_one(small_model, small_tokenizer) -> None:
    """Texts end after 1 to 9 tokens. All steps but those at the end compute three rows."""
    requests = [
        Request(f"{place} the cat", GenerationConfig(max_new_tokens=1 + place * 5 % 9, stop_at_eot=False, seed=0))
        for place in range(20)
    ]
    steps: list[Step] = []
    many = list(complete_requests(small_model, small_tokenizer, iter(requests), batch_size=3, on_step=steps.append))
    assert [len(group[0].ids) for group in many] == [request.config.max_new_tokens for request in requests]
    decoded = [step.n_rows for step in steps if isinstance(step, OneToken)]
    decoded += [step.n_rows + step.n_running for step in steps if isinstance(step, Prefill) and step.n_running]
    assert max(decoded) == 3 and decoded.count(3) > 20 and len(decoded) - decoded.count(3) < 9
    for request, group in zip(requests, many, strict=True):
        assert group[0].ids == complete(small_model, small_tokenizer, request.prompt, request.config)[0].ids


def test_samples_and_beams_count_as_rows(small_model, small_tokenizer) -> None:
    shapes: list[int] = []
    hook = small_model.wte.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape[0]))
    options = {"do_sample": True, "num_return_sequences": 7, "seed": 1, "max_new_tokens": 5}
    try:
        (group,) = complete_in_batches(small_model, small_tokenizer, ["The cat"], batch_size=2, **options)
    finally:
        hook.remove()
    assert max(shapes) == 2
    assert [c.ids for c in group] == [c.ids for c in complete(small_model, small_tokenizer, "The cat", **options)]
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
    groups = list(complete_in_batches(small_model, small_tokenizer, ["The cat", "A dog"], batch_size=2, **beams))
    assert [[c.ids for c in group] for group in groups] == [
        [c.ids for c in complete(small_model, small_tokenizer, prompt, **beams)] for prompt in ("The cat", "A dog")
    ]


def test_prompts_are_read_from_a_generator_as_rows_end(small_model, small_tokenizer) -> None:
    n_read = 0

    def prompts():
        nonlocal n_read
        while True:
            n_read += 1
            yield f"{n_read} cats"

    many = complete_in_batches(small_model, small_tokenizer, prompts(), batch_size=2, max_new_tokens=2)
    assert [next(many)[0].prompt for _ in range(5)] == [f"{n} cats" for n in range(1, 6)]
    assert n_read < 10


def test_what_does_not_fit_in_memory_is_refused_before_it_is_taken(small_model, small_tokenizer) -> None:
    for options in ({"num_return_sequences": 10**9, "do_sample": True}, {"num_beams": 10**9}):
        name = next(iter(options))
        with pytest.raises(ConfigError, match=rf"^{name}=1000000000 takes at least .* TB of memory .* are free"):
            complete(small_model, small_tokenizer, "The cat", max_new_tokens=100, **options)


def test_without_a_seed_all_batches_share_one_drawn_seed(small_model, small_tokenizer) -> None:
    many = complete_in_batches(small_model, small_tokenizer, ["a", "b", "c"], batch_size=1, max_new_tokens=1, do_sample=True)
    assert len({group[0].seed for group in many}) == 1
