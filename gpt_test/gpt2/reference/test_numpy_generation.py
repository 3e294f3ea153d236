"""Sampling in NumPy against `generation.sampling`, and generated ids against those of the PyTorch model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.generation import processors, sampling
from gpt2.reference import numpy_sampling
from gpt2.reference.numpy_generation import stream_ids, stream_text
from gpt2.reference.numpy_model import NumpyGPT2
from gpt_config import CheckpointError, GenerationConfig, GPT2Config, InputError
from gpt_test.conftest import random_model

TINY = GPT2Config(vocab_size=13, n_positions=7, n_embd=6, n_layer=2, n_head=3, eos_token_id=None, bos_token_id=2)
logits_rows = st.lists(st.lists(st.floats(-20, 20), min_size=7, max_size=7), min_size=1, max_size=4).map(np.array)


def twin(model: GPT2) -> NumpyGPT2:
    parameters = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return NumpyGPT2(model.config, parameters, dtype="float64")


def assert_same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-12)


@given(logits_rows, st.integers(1, 7), st.floats(0.1, 5), st.floats(0.01, 9), st.data())
def test_steps_equal_pytorch(logits: np.ndarray, top_k: int, penalty: float, temperature: float, data) -> None:
    tensor, copy = torch.tensor(logits), logits.copy()
    for k in (top_k, 8):
        assert_same(numpy_sampling.apply_top_k(logits, k), sampling.apply_top_k(tensor, k))
    assert_same(numpy_sampling.apply_temperature(logits, temperature), sampling.apply_temperature(tensor, temperature))
    ids = st.lists(st.integers(0, 6), max_size=9)
    seen = data.draw(st.lists(ids, min_size=len(logits), max_size=len(logits)))
    assert_same(
        numpy_sampling.apply_repetition_penalty(logits, seen, penalty),
        processors.apply_repetition_penalty(tensor, seen, penalty),
    )
    assert (numpy_sampling.greedy(logits) == sampling.greedy(tensor).numpy()).all()
    assert (logits == copy).all()


@given(st.permutations(range(7)), st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.floats(0, 1, exclude_max=True))
def test_cuts_and_draws_equal_pytorch(order: list[int], top_p: float, min_p: float, uniform: float) -> None:
    """Equal probabilities and values at a limit are left out: there the choice is arbitrary or depends on rounding."""
    probs = np.array([[0.37, 0.23, 0.15, 0.11, 0.08, 0.05, 0.01]])[:, order]
    logits, tensor = np.log(probs), torch.tensor(probs).log()
    if np.abs(np.cumsum(-np.sort(-probs)) - top_p).min() > 1e-9:
        assert_same(numpy_sampling.apply_top_p(logits, top_p), sampling.apply_top_p(tensor, top_p))
    if np.abs(probs - min_p * probs.max()).min() > 1e-9:
        assert_same(numpy_sampling.apply_min_p(logits, min_p), sampling.apply_min_p(tensor, min_p))
    config = GenerationConfig(do_sample=True, temperature=0.8, top_k=6, top_p=0.9, min_p=0.03, typical_p=0.8)
    ours, theirs = numpy_sampling.logits_to_probs(logits, config), sampling.logits_to_probs(tensor, config)
    assert_same(ours, theirs)
    if np.abs(np.cumsum(ours) - uniform).min() > 1e-9:
        assert numpy_sampling.sample(ours, [uniform]).tolist() == sampling.sample(theirs, [uniform]).tolist()


def test_frequency_and_presence_penalties() -> None:
    logits = np.zeros((2, 4))
    seen = [[1, 1, 1, 3], []]
    assert numpy_sampling.apply_frequency_penalty(logits, seen, 0.5).tolist() == [[0, -1.5, 0, -0.5], [0, 0, 0, 0]]
    assert numpy_sampling.apply_presence_penalty(logits, seen, 0.5).tolist() == [[0, -0.5, 0, -0.5], [0, 0, 0, 0]]
    assert numpy_sampling.apply_presence_penalty(logits, seen, -1.0).tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]


def test_a_token_of_probability_0_is_never_drawn() -> None:
    probs = np.array([[0.0, 0.5, 0.5, 0.0]])
    assert numpy_sampling.sample(probs, [np.nextafter(1, 0)]).tolist() == [2]
    assert numpy_sampling.sample(probs, [0.0]).tolist() == [1]


@pytest.mark.filterwarnings("ignore::gpt_config.GPT2Warning")  # about prompts longer than the context
@pytest.mark.parametrize("n_positions", [1, 2, 7])
@pytest.mark.parametrize("penalty", [1.0, 1.8])
def test_greedy_ids_equal_pytorch_past_the_context(n_positions: int, penalty: float) -> None:
    config = GPT2Config(vocab_size=13, n_positions=n_positions, n_embd=6, n_layer=2, n_head=3, eos_token_id=None)
    model = random_model(config, dtype=torch.float64)
    with torch.no_grad():
        model.wpe.weight.mul_(20)  # so that the text depends on where the window begins
    how = GenerationConfig(max_new_tokens=17, repetition_penalty=penalty)
    for prompt in ([1], [1, 2, 3], list(range(12))):
        theirs = model.generate(torch.tensor([prompt]), how)[0, len(prompt) :].tolist()
        assert list(stream_ids(twin(model), prompt, how)) == theirs
        assert list(stream_ids(twin(model), prompt, how, use_cache=False)) == theirs


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {3: 2.0, 4: -np.inf, 12: 1.0}},
        {"frequency_penalty": 0.7, "presence_penalty": 0.3},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "penalty_window": 3},
        {"eos_token_id": [2, 3, 5, 7], "min_new_tokens": 4},
        {"stop_at_eot": False},
    ],
    ids=str,
)
def test_greedy_ids_with_controls_equal_pytorch(options: dict[str, object]) -> None:
    config = GPT2Config(**{**vars(TINY), "n_positions": 40, "eos_token_id": 12})
    model, how = random_model(config, dtype=torch.float64), GenerationConfig(max_new_tokens=17, **options)
    for prompt in ([1], [1, 2, 3]):
        assert (
            list(stream_ids(twin(model), prompt, how))
            == model.generate(torch.tensor([prompt]), how)[0, len(prompt) :].tolist()
        )


def test_sampled_ids_follow_the_seed_and_the_options() -> None:
    model = twin(random_model(TINY))
    how = GenerationConfig(max_new_tokens=30, do_sample=True, temperature=3.0, seed=0)
    ids = list(stream_ids(model, [1], how))
    assert ids == list(stream_ids(model, [1], how)) == list(stream_ids(model, [1], how, use_cache=False))
    assert ids != list(stream_ids(model, [1], GenerationConfig(max_new_tokens=30, do_sample=True, temperature=3.0, seed=1)))
    assert max(stream_ids(model, [1], how, vocab_size=4)) < 4
    # With a strong penalty of either kind, no token repeats until all others have been used.
    for name in ("frequency_penalty", "presence_penalty"):
        ids = list(stream_ids(model, [1], GenerationConfig(max_new_tokens=13, **{name: 1e6})))
        assert sorted(ids) == list(range(13))
    assert list(stream_ids(model, [], how)) == list(stream_ids(model, [2], how))  # the bos_token_id


def test_generation_uses_no_dropout() -> None:
    model = NumpyGPT2(TINY)
    how = GenerationConfig(max_new_tokens=9)
    ids = list(stream_ids(model, [1], how))
    assert list(stream_ids(model.train(), [1], how)) == ids and model.training


def test_it_ends_at_the_eot_token() -> None:
    free = list(stream_ids(NumpyGPT2(TINY), [1], GenerationConfig(max_new_tokens=9)))
    config = GPT2Config(**{**vars(TINY), "eos_token_id": free[4]})
    ended = list(stream_ids(NumpyGPT2(config), [1], GenerationConfig(max_new_tokens=9)))
    assert ended == free[: free.index(free[4]) + 1]
    assert list(stream_ids(NumpyGPT2(config), [1], GenerationConfig(max_new_tokens=9, stop_at_eot=False))) == free


def test_streamed_text_is_the_text_of_the_ids(small_folder, small_tokenizer) -> None:
    model = NumpyGPT2.from_pretrained(small_folder, dtype="float64")
    how = GenerationConfig(max_new_tokens=25, do_sample=True, temperature=2.0, seed=3)
    ids = list(stream_ids(model, small_tokenizer.encode("Once"), how, vocab_size=small_tokenizer.vocab_size))
    expected = small_tokenizer.decode([token for token in ids if token != small_tokenizer.eot_token_id])
    assert "".join(stream_text(model, small_tokenizer, "Once", how)) == expected
    greedy = GPT2.from_pretrained(small_folder, dtype="float64").generate(
        small_tokenizer.encode("Once", return_tensors="pt"), max_new_tokens=9
    )
    text = "Once" + "".join(stream_text(model, small_tokenizer, "Once", GenerationConfig(max_new_tokens=9)))
    assert text == small_tokenizer.decode(greedy[0]).removesuffix("<|endoftext|>")


def test_bad_input_is_refused() -> None:
    model = NumpyGPT2(TINY)
    with pytest.raises(InputError, match="from 0 to 12"):
        next(stream_ids(model, [13]))
    with pytest.raises(InputError, match="num_beams"):
        next(stream_ids(model, [1], GenerationConfig(num_beams=2)))
    with pytest.raises(InputError, match="the NumPy engine has no no_repeat_ngram_size=2: leave it out"):
        next(stream_ids(model, [1], GenerationConfig(no_repeat_ngram_size=2)))
    with pytest.raises(InputError, match="empty"):
        next(stream_ids(NumpyGPT2(GPT2Config(**{**vars(TINY), "bos_token_id": None})), []))
    model.parameters["ln_f.bias"][:] = np.nan
    with pytest.raises(CheckpointError, match="NaN"):
        next(stream_ids(model, [1]))
