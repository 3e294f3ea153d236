"""Controls on logits: each gives the logits of transformers' processor, or of the formula that its source states."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2.generation import processors
from gpt2.generation.processors import Controls, Text
from gpt_config import GenerationConfig, InputError, InputTypeError

V = 7
logits_rows = st.lists(st.lists(st.floats(-20, 20), min_size=V, max_size=V), min_size=2, max_size=2).map(torch.tensor)
texts_of_4 = st.lists(st.lists(st.integers(0, V - 1), min_size=4, max_size=4), min_size=2, max_size=2)
words = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=5), min_size=1, max_size=4)


def assert_equals(ours: Tensor, process: Any, logits: Tensor, texts: list[list[int]]) -> None:
    torch.testing.assert_close(ours, process(torch.tensor(texts), logits.clone()))


@given(logits_rows, texts_of_4, st.floats(0.1, 5.0))
def test_repetition_penalty(logits: Tensor, texts: list[list[int]], penalty: float) -> None:
    process = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(penalty)
    before = logits.clone()
    assert_equals(processors.apply_repetition_penalty(logits, texts, penalty), process, logits, texts)
    assert torch.equal(logits, before)


@given(logits_rows, texts_of_4, st.integers(1, 6))
def test_no_repeat_ngram_size(logits: Tensor, texts: list[list[int]], size: int) -> None:
    process = pytest.importorskip("transformers").NoRepeatNGramLogitsProcessor(size)
    assert_equals(processors.apply_no_repeat_ngram(logits, texts, size), process, logits, texts)


@given(logits_rows, texts_of_4, words)
def test_bad_words(logits: Tensor, texts: list[list[int]], bad: list[list[int]]) -> None:
    process = pytest.importorskip("transformers").NoBadWordsLogitsProcessor(bad)
    assert_equals(processors.apply_bad_words(logits, texts, bad), process, logits, texts)


@given(logits_rows, st.dictionaries(st.integers(0, V - 1), st.floats(-9, 9), min_size=1))
def test_logit_bias(logits: Tensor, bias: dict[int, float]) -> None:
    process = pytest.importorskip("transformers").SequenceBiasLogitsProcessor({(token,): n for token, n in bias.items()})
    assert_equals(processors.apply_logit_bias(logits, tuple(bias.items())), process, logits, [[0], [1]])
    assert torch.equal(processors.apply_logit_bias(logits, ((V, 1.0),)), logits)


@given(logits_rows, texts_of_4, st.integers(0, 4), st.integers(0, 4), st.sets(st.integers(0, V - 1), min_size=1))
def test_min_new_tokens(logits: Tensor, texts: list[list[int]], n_prompt: int, n: int, ends: set[int]) -> None:
    process = pytest.importorskip("transformers").MinNewTokensLengthLogitsProcessor(n_prompt, n, list(ends))
    n_new = [4 - n_prompt] * 2
    assert_equals(processors.apply_min_new_tokens(logits, n_new, n, ends), process, logits, texts)


@given(logits_rows, texts_of_4, st.floats(-2, 2), st.floats(-2, 2))
def test_frequency_and_presence_penalty(logits: Tensor, texts: list[list[int]], frequency: float, presence: float) -> None:
    """The formula of OpenAI's API, token by token."""
    expected = logits.clone()
    for row, ids in zip(expected, texts, strict=True):
        for token in range(V):
            count = ids.count(token)
            row[token] = row[token] - count * frequency - float(count > 0) * presence
    ours = processors.apply_frequency_penalty(logits, texts, frequency)
    torch.testing.assert_close(processors.apply_presence_penalty(ours, texts, presence), expected)


@given(logits_rows, texts_of_4, st.integers(0, 4), st.integers(1, 6))
def test_the_window_of_the_penalties(logits: Tensor, texts: list[list[int]], n_prompt: int, window: int) -> None:
    """The repetition penalty counts the prompt too, the others do not."""
    options = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    config = GenerationConfig(penalty_window=window, **options)
    rows = [Text(ids, n_prompt, random.Random(0)) for ids in texts]
    expected = processors.apply_repetition_penalty(logits, [ids[-window:] for ids in texts], 1.3)
    new = [[token for place, token in enumerate(ids) if place >= n_prompt and place >= 4 - window] for ids in texts]
    expected = processors.apply_frequency_penalty(expected, new, 0.5)
    expected = processors.apply_presence_penalty(expected, new, 0.25)
    assert torch.equal(processors.process(logits, rows, Controls(config)), expected)


def test_an_end_token_among_the_bad_words_still_ends_a_text() -> None:
    """As in transformers."""
    config, text = GenerationConfig(bad_words=[[1], [2], [0, 3]]), Text([0], 0, random.Random(0))
    process = pytest.importorskip("transformers").NoBadWordsLogitsProcessor([[1], [2], [0, 3]], eos_token_id=[2])
    logits = torch.zeros(1, V)
    ours = processors.process(logits, [text], Controls(config, ends=(2,)))
    assert_equals(ours, process, logits, [[0]])
    assert ours.isfinite().tolist() == [[True, False, True, False, True, True, True]]


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda ids, logits: logits.fill_(-torch.inf), "the controls exclude every token: logit_bias, logits_processor"),
        (lambda ids, logits: logits * torch.nan, "returned a logit of nan: it must return numbers"),
        (lambda ids, logits: logits.fill_(torch.inf), "returned a logit of inf: it must return numbers"),
        (lambda ids, logits: None, r"returned NoneType: it must return a tensor of the shape of its logits, \(1, 7\)"),
        (lambda ids, logits: logits[0], r"returned \(7,\): it must return a tensor of the shape of its logits, \(1, 7\)"),
    ],
)  # fmt: skip
def test_a_wrong_result_of_a_processor_is_one_line(processor: Any, message: str) -> None:
    controls = Controls(GenerationConfig(logit_bias={1: 1.0}), (), (processor,))
    with pytest.raises(InputError, match=message):
        processors.process(torch.zeros(2, V), [Text([1], 1, random.Random(0))] * 2, controls)


def test_one_processor_or_several() -> None:
    transformers = pytest.importorskip("transformers")
    one = transformers.TopKLogitsWarper(2)
    assert processors.as_processors(None) == () == processors.as_processors([])
    assert processors.as_processors(one) == (one,) == processors.as_processors([one])
    listed = transformers.LogitsProcessorList([one])
    assert processors.as_processors(listed) == (listed,)  # it is itself a function
    for wrong in (5, "x", [5], [one, None]):
        with pytest.raises(InputTypeError, match="logits_processor must be a function"):
            processors.as_processors(wrong)
