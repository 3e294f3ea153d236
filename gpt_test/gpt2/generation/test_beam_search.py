"""Beam search gives the ids of transformers' beam search."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import complete
from gpt2.generation.beam_search import Beam, beam_search
from gpt_config import GenerationConfig, GPT2Config
from gpt_test.conftest import random_model, transformers_twin

CONFIG = GPT2Config(vocab_size=30, n_positions=40, n_embd=24, n_layer=2, n_head=3, eos_token_id=29, bos_token_id=29)
ENDS = [29, 1, 5, 9, 14, 20]  # so many that most texts end early


@given(
    seed=st.integers(0, 14),
    prompt=st.lists(st.integers(0, 28), min_size=1, max_size=8),
    num_beams=st.integers(2, 5),
    n=st.integers(1, 15),
    penalty=st.sampled_from([1.0, 1.2]),
    length_penalty=st.sampled_from([1.0, 0.0, -1.5, 3.0]),
    early_stopping=st.sampled_from([True, False, "never"]),
    ends=st.sampled_from([[29], ENDS]),
)
@settings(max_examples=25)
def test_beams_equal_transformers(seed, prompt, num_beams, n, penalty, length_penalty, early_stopping, ends) -> None:
    pytest.importorskip("transformers")
    model, ids = random_model(CONFIG, seed, torch.float64), torch.tensor([prompt])
    options = {
        "num_beams": num_beams,
        "num_return_sequences": num_beams,
        "max_new_tokens": n,
        "repetition_penalty": penalty,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
        "eos_token_id": ends,
    }
    expected = transformers_twin(model).generate(ids, do_sample=False, pad_token_id=29, **options)
    assert model.generate(ids, **options).tolist() == expected.tolist()


def test_these_options_make_a_difference() -> None:
    """Otherwise the test above could not see them."""
    found: dict[object, list[list[list[int]]]] = {}
    for seed in range(6):
        model = random_model(CONFIG, seed, torch.float64)
        for option in (
            {},
            {"length_penalty": 3.0},
            {"early_stopping": True},
            {"early_stopping": "never", "length_penalty": 3.0},
        ):
            config = GenerationConfig(num_beams=4, num_return_sequences=4, max_new_tokens=15, eos_token_id=ENDS, **option)
            found.setdefault(str(option), []).append([beam.ids for beam in beam_search(model, [1], config)])
    assert len({str(ids) for ids in found.values()}) == 4


@given(
    seed=st.integers(0, 14),
    num_beams=st.integers(2, 4),
    control=st.sampled_from(
        [
            {"min_new_tokens": 6},
            {"no_repeat_ngram_size": 2},
            {"bad_words_ids": [[3], [29], [7, 1], [8, 2]]},
            {"sequence_bias": [[[29], 2.0], [[4], -1.0]]},
            {"eos_token_id": [29, 3, 11, 12]},
        ]
    ),
)
@settings(max_examples=20)
def test_beams_with_controls_equal_transformers(seed: int, num_beams: int, control: dict[str, Any]) -> None:
    """In a padded batch of two prompts."""
    pytest.importorskip("transformers")
    model = random_model(CONFIG, seed, torch.float64)
    ids, mask = torch.tensor([[29, 29, 5, 6], [1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"attention_mask": mask, "num_beams": num_beams, "num_return_sequences": 2, "max_new_tokens": 12}
    expected = transformers_twin(model).generate(ids, do_sample=False, pad_token_id=29, **options, **control)
    ours = dict(control)
    if "sequence_bias" in control:
        ours = {"logit_bias": {token: number for [token], number in control["sequence_bias"]}}
    elif "bad_words_ids" in control:
        ours = {"bad_words": control["bad_words_ids"]}
    made = model.generate(ids, **options, **ours)
    assert made.tolist() == expected.tolist()


def test_beams_end_at_stop_strings_as_in_transformers(small_config, small_folder, small_tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, n_stopped, n_different = transformers.AutoTokenizer.from_pretrained(small_folder), 0, 0
    for seed in range(6):
        model = random_model(small_config, seed, torch.float64)
        twin, prompt = transformers_twin(model), "The cat"
        ids = torch.tensor([small_tokenizer.encode(prompt)])
        for num_beams in (2, 4):
            options = {"num_beams": num_beams, "num_return_sequences": 2, "max_new_tokens": 16}
            plain = complete(model, small_tokenizer, prompt, **options)
            text = plain[0].text
            stop = next(text[at : at + 2] for at in range(1, len(text)) if "\ufffd" not in text[at : at + 2])
            made = complete(model, small_tokenizer, prompt, stop=[stop], **options)
            expected = twin.generate(ids, stop_strings=[stop], tokenizer=theirs, do_sample=False, pad_token_id=0, **options)
            for ours, row in zip(made, expected[:, ids.shape[1] :].tolist(), strict=True):
                assert ours.ids == row[: len(ours.ids)] and set(row[len(ours.ids) :]) <= {0, small_config.eos_token_id}
                assert len(ours.logprobs) == len(ours.ids)
                if ours.finish_reason == "stop":
                    whole = small_tokenizer.decode(ours.ids)
                    assert ours.text == whole[: whole.find(stop)] and stop not in small_tokenizer.decode(ours.ids[:-1])
                    n_stopped += 1
            n_different += not plain[0].text.startswith(made[0].text)
    assert n_stopped > 10 and n_different > 0


def test_a_beam_lists_the_best_tokens_of_its_own_steps() -> None:
    model = random_model(CONFIG, dtype=torch.float64)
    config = GenerationConfig(num_beams=3, max_new_tokens=5, top_logprobs=4)
    beam = beam_search(model, [1, 2], config)[0]
    for step, listed in enumerate(beam.top_logprobs):
        logprobs = model(torch.tensor([[1, 2, *beam.ids[:step]]]))[0, -1].log_softmax(-1)
        assert [token for token, _ in listed] == logprobs.topk(4).indices.tolist()
        assert [number for _, number in listed] == pytest.approx(logprobs.topk(4).values.tolist())
    assert len(beam.top_logprobs) == len(beam.ids) == 5


def test_some_of_these_searches_end_early() -> None:
    """Otherwise the test above would not cover the end-of-text token."""
    config = GenerationConfig(num_beams=4, num_return_sequences=4, max_new_tokens=15)
    beams = [beam for seed in range(15) for beam in beam_search(random_model(CONFIG, seed, torch.float64), [1], config)]
    assert {beam.finish_reason for beam in beams} == {"eot", "length"}
    assert len({len(beam.ids) for beam in beams}) > 3


def test_beams_continue_past_the_context_with_and_without_a_cache() -> None:
    model = random_model(CONFIG, dtype=torch.float64)
    config = GenerationConfig(num_beams=3, max_new_tokens=70, stop_at_eot=False)
    cached, plain = (beam_search(model, [1, 2], config, use_cache=use_cache)[0] for use_cache in (True, False))
    assert len(cached.ids) == 70 and cached.ids == plain.ids


def test_each_prompt_of_a_batch_has_its_own_search() -> None:
    model = random_model(CONFIG, dtype=torch.float64)
    both = model.generate(torch.tensor([[1, 2], [3, 4]]), num_beams=2, max_new_tokens=5, stop_at_eot=False)
    alone = [
        model.generate(torch.tensor([row]), num_beams=2, max_new_tokens=5, stop_at_eot=False) for row in ([1, 2], [3, 4])
    ]
    assert both.tolist() == torch.cat(alone).tolist()


def test_an_absurd_length_penalty_gives_a_score() -> None:
    """The power of the length is beyond the largest or the smallest float; transformers ends with an OverflowError."""
    beam = Beam([1, 2], total=-3.0)
    assert [beam.score(penalty) for penalty in (1e308, -1e308, 2.0)] == [0.0, -math.inf, -0.75]


def test_more_beams_than_the_vocabulary_has_tokens() -> None:
    model = random_model(GPT2Config(vocab_size=3, n_positions=9, n_embd=4, n_layer=1, n_head=1), dtype=torch.float64)
    assert model.generate(torch.tensor([[1]]), num_beams=5, num_return_sequences=5, max_new_tokens=4).shape == (5, 5)
