"""Sampling: each function gives the logits of transformers' processor, and drawn tokens follow the distribution."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2.generation import processors, sampling
from gpt2.reference import numpy_sampling
from gpt_config import GenerationConfig

logits_rows = st.lists(st.lists(st.floats(-20, 20), min_size=7, max_size=7), min_size=1, max_size=4).map(torch.tensor)


def processed(processor, logits: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    return processor(torch.zeros(len(logits), 1, dtype=torch.long) if ids is None else ids, logits.clone())


@given(logits_rows, st.integers(1, 7))
def test_top_k_equals_transformers(logits: torch.Tensor, top_k: int) -> None:
    process = pytest.importorskip("transformers").TopKLogitsWarper(top_k)
    torch.testing.assert_close(sampling.apply_top_k(logits, top_k), processed(process, logits))


@given(st.permutations(range(7)), st.floats(0.01, 0.99))
def test_top_p_equals_transformers(order: list[int], top_p: float) -> None:
    """The probabilities are distinct, because the order of equal ones is not defined."""
    probs = torch.tensor([[0.37, 0.23, 0.15, 0.11, 0.08, 0.05, 0.01]], dtype=torch.float64)[:, order]
    sums = probs.sort(descending=True).values.cumsum(-1)
    if (sums - top_p).abs().min() < 1e-6:  # so close to top_p that rounding decides
        return
    process = pytest.importorskip("transformers").TopPLogitsWarper(top_p)
    torch.testing.assert_close(sampling.apply_top_p(probs.log(), top_p), processed(process, probs.log()))


def test_top_p_on_a_large_vocabulary_equals_transformers() -> None:
    torch.manual_seed(0)
    process = pytest.importorskip("transformers").TopPLogitsWarper
    for scale in (0.01, 1.0, 5.0):  # a flat distribution keeps nearly all tokens, a steep one a few
        logits = scale * torch.randn(3, 5000, dtype=torch.float64)
        for top_p in (0.1, 0.5, 0.95):
            torch.testing.assert_close(sampling.apply_top_p(logits, top_p), processed(process(top_p), logits))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=9), st.floats(0.01, 0.99))
def test_top_p_keeps_the_first_of_equals(weights: list[int], top_p: float) -> None:
    probs = torch.tensor([weights], dtype=torch.float64) / sum(weights)
    order = sorted(range(len(weights)), key=lambda place: -weights[place])  # stable: equal weights keep their order
    reached, expected = 0.0, set()
    for place in order:
        if abs(reached - top_p) < 1e-6:  # so close to top_p that rounding decides
            return
        if reached < top_p:
            expected.add(place)
        reached += weights[place] / sum(weights)
    kept = sampling.apply_top_p(probs.log(), top_p).isfinite()[0]
    assert set(kept.nonzero()[:, 0].tolist()) == expected


def test_top_p_takes_any_rows() -> None:
    """No rows, a row without a batch dimension, two batch dimensions; rows of -inf or NaN keep nothing."""
    logits = torch.randn(2, 3, 50, generator=torch.manual_seed(0))
    kept = sampling.apply_top_p(logits, 0.8)
    for row, of_batch in zip(logits.flatten(0, 1), kept.flatten(0, 1), strict=True):
        assert torch.equal(sampling.apply_top_p(row, 0.8), of_batch)
    assert sampling.apply_top_p(logits[0, :0], 0.8).shape == (0, 50)
    for row in (torch.full((1, 5), -torch.inf), torch.full((1, 5), torch.nan)):
        assert not sampling.apply_top_p(row, 0.8).isfinite().any()
    assert not sampling.apply_top_p(logits[0], 0.0).isfinite().any()


@given(logits_rows, st.floats(0.01, 1.0))
def test_min_p_equals_transformers(logits: torch.Tensor, min_p: float) -> None:
    logits = logits.double()
    probs = logits.softmax(-1)
    if (probs - min_p * probs.amax(-1, keepdim=True)).abs().min() < 1e-9 * probs.amax():
        return
    process = pytest.importorskip("transformers").MinPLogitsWarper(min_p)
    torch.testing.assert_close(sampling.apply_min_p(logits, min_p), processed(process, logits))


@given(logits_rows, st.floats(0.01, 0.99))
def test_typical_p_equals_transformers(logits: torch.Tensor, typical_p: float) -> None:
    logits = logits.double()
    logprobs = logits.log_softmax(-1)
    distances = (-logprobs - torch.special.entr(logprobs.exp()).sum(-1, keepdim=True)).abs().sort(-1)
    sums = logprobs.exp().gather(-1, distances.indices).cumsum(-1)
    if (sums - typical_p).abs().min() < 1e-6 or distances.values.diff(dim=-1).min() < 1e-6:  # rounding decides
        return
    process = pytest.importorskip("transformers").TypicalLogitsWarper(typical_p)
    torch.testing.assert_close(sampling.apply_typical_p(logits, typical_p), processed(process, logits))


@given(logits_rows, st.floats(1e-300, 1e300))
def test_any_temperature_gives_a_distribution(logits: torch.Tensor, temperature: float) -> None:
    probs = sampling.logits_to_probs(logits, GenerationConfig(do_sample=True, temperature=temperature))
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(logits), dtype=torch.float64))


@given(logits_rows, st.floats(0.2, 3))
def test_temperature_divides_logits(logits: torch.Tensor, temperature: float) -> None:
    probs = sampling.logits_to_probs(logits, GenerationConfig(do_sample=True, temperature=temperature))
    torch.testing.assert_close(probs, (logits.double() / temperature).softmax(-1))


def test_the_order_is_that_of_transformers() -> None:
    """Temperature first, then top-k, top-p, min-p and typical-p, each on the tokens that are left."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 200, dtype=torch.float64)
    expected = logits
    for process in (
        transformers.TemperatureLogitsWarper(0.7), transformers.TopKLogitsWarper(30),
        transformers.TopPLogitsWarper(0.8), transformers.MinPLogitsWarper(0.05),
        transformers.TypicalLogitsWarper(0.9),
    ):  # fmt: skip
        expected = processed(process, expected)
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=30, top_p=0.8, min_p=0.05, typical_p=0.9)
    torch.testing.assert_close(sampling.logits_to_probs(logits, config), expected.softmax(-1))


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    logits = torch.randn(2, 7, generator=torch.manual_seed(0))
    for top_k in (None, 7, 8, 10**9):
        assert torch.equal(sampling.apply_top_k(logits, top_k), logits)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0, 1, exclude_max=True))
def test_a_token_of_probability_zero_is_never_drawn(weights: list[float], uniform: float) -> None:
    probs = torch.tensor([weights], dtype=torch.float64)
    if probs.sum() < 1e-6:
        return
    token = sampling.sample(probs / probs.sum(), [uniform]).item()
    assert weights[token] > 0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval(uniform: float) -> None:
    probs = torch.tensor([[0.0, 0.25, 0.75, 0.0]], dtype=torch.float64)
    assert sampling.sample(probs, [uniform]).item() == (1 if uniform == 0 else 2)


def test_frequencies_are_the_probabilities() -> None:
    """Pearson's chi-squared test on 20,000 draws with a fixed seed, at a significance level of 1e-6."""
    probs = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]], dtype=torch.float64)
    draws, generator = 20_000, random.Random(7)
    tokens = sampling.sample(probs.expand(draws, -1).contiguous(), [generator.random() for _ in range(draws)])
    expected = probs[0] * draws
    statistic = ((tokens.bincount(minlength=5) - expected) ** 2 / expected).sum().item()
    assert statistic < 33.4  # 4 degrees of freedom, p = 1e-6
    assert math.isfinite(statistic)


@pytest.mark.parametrize(("dtype", "penalty"), [(torch.float64, 1e-307), (torch.float64, 1.7e308), (torch.float32, 1e-300)])
def test_a_penalty_never_gives_infinity(dtype: torch.dtype, penalty: float) -> None:
    """The softmax of two infinite logits is NaN."""
    before, seen = torch.tensor([[50.0, 60.0, -50.0, 1.0, -torch.inf]], dtype=dtype), [[0, 0, 1, 1, 2, 2, 4]]
    for name, value in (("repetition", penalty), ("frequency", 1e308), ("frequency", -1e308), ("presence", -1.7e308)):
        theirs = getattr(numpy_sampling, f"apply_{name}_penalty")(before.numpy(), seen, value)
        logits = getattr(processors, f"apply_{name}_penalty")(before, seen, value)
        assert theirs[0, :4].tolist() == pytest.approx(logits[0, :4].tolist())
        for made in (logits, torch.from_numpy(theirs)):
            assert bool(made[:, :4].isfinite().all()) and bool(made.softmax(-1).isfinite().all())
            assert made[0, 4] == -torch.inf  # what is excluded stays so
    biased = processors.apply_logit_bias(before, ((0, 1.7e308), (1, -1.7e308), (2, -torch.inf)))
    assert biased.isfinite().tolist() == [[True, True, False, True, False]]


def test_a_threshold_equal_to_the_total_gives_a_token_that_is_possible() -> None:
    """In float32 the largest random number below 1 is 1, and its threshold the total."""
    probs = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]])
    assert sampling.sample(probs, [1 - 2**-53, 1 - 2**-53]).tolist() == [1, 0]
