"""Beam search gives the ids of transformers' beam search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.generation.beam_search import beam_search
from gpt_config import GenerationConfig, GPT2Config
from gpt_test.conftest import random_model, transformers_twin

CONFIG = GPT2Config(vocab_size=30, n_positions=40, n_embd=24, n_layer=2, n_head=3, eos_token_id=29, bos_token_id=29)


@given(
    seed=st.integers(0, 14),
    prompt=st.lists(st.integers(0, 28), min_size=1, max_size=8),
    num_beams=st.integers(2, 5),
    n=st.integers(1, 15),
    penalty=st.sampled_from([1.0, 1.2]),
)
@settings(max_examples=15)
def test_beams_equal_transformers(seed: int, prompt: list[int], num_beams: int, n: int, penalty: float) -> None:
    pytest.importorskip("transformers")
    model = random_model(CONFIG, seed, torch.float64)
    expected = transformers_twin(model).generate(
        torch.tensor([prompt]), num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=n, do_sample=False,
        pad_token_id=29, repetition_penalty=penalty,
    )  # fmt: skip
    ours = model.generate(
        torch.tensor([prompt]),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=n,
        repetition_penalty=penalty,
    )
    assert ours.tolist() == expected.tolist()


def test_some_of_these_searches_end_early() -> None:
    """Otherwise the test above would not cover the end-of-text token."""
    config = GenerationConfig(num_beams=4, num_return_sequences=4, max_new_tokens=15)
    beams = [beam for seed in range(15) for beam in beam_search(random_model(CONFIG, seed, torch.float64), [1], config)]
    assert {beam.at_eot for beam in beams} == {True, False}
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


def test_more_beams_than_the_vocabulary_has_tokens() -> None:
    model = random_model(GPT2Config(vocab_size=3, n_positions=9, n_embd=4, n_layer=1, n_head=1), dtype=torch.float64)
    assert model.generate(torch.tensor([[1]]), num_beams=5, num_return_sequences=5, max_new_tokens=4).shape == (5, 5)
