"""Scores equal those of transformers for each continuation alone, whether tokens are shared, padded or truncated."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.evaluation.scoring import Request, Score, ScoringLimits, log_likelihoods
from gpt_config import CheckpointError, ConfigError, GPT2Config, InputError
from gpt_test.conftest import random_model, transformers_twin
from gpt_test.gpt2.evaluation.watched import watched

N_POSITIONS, VOCAB_SIZE = 16, 11
TINY = GPT2Config(
    vocab_size=VOCAB_SIZE, n_positions=N_POSITIONS, n_embd=12, n_layer=2, n_head=3, bos_token_id=7, eos_token_id=7
)
MODEL = random_model(TINY)
TWIN = transformers_twin(MODEL)


@torch.no_grad()
def alone(twin, context: list[int], continuation: list[int], limit: int) -> Score:
    """The score from one forward pass over this text only, truncated as in lm-evaluation-harness."""
    ids = torch.tensor([(context + continuation)[-(limit + 1) :]])
    log_probs = twin(ids[:, :-1]).logits[0, -len(continuation) :].double().log_softmax(-1)
    targets = torch.tensor(continuation)
    return Score(
        log_probs.gather(1, targets[:, None]).sum().item(),
        bool((log_probs.argmax(-1) == targets).all()),
        len(continuation),
    )


def assert_close(found: list[list[Score]], expected: list[list[Score]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for mine, other in zip(chain(*found), chain(*expected), strict=True):
        assert mine.log_prob == pytest.approx(other.log_prob, abs=1e-4)
        assert mine[1:] == other[1:]


ids = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=N_POSITIONS)
contexts = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=N_POSITIONS + 5)
requests_of_any_kind = st.lists(st.tuples(contexts, st.lists(ids, max_size=4)), max_size=7)


limits = st.just(ScoringLimits()) | st.builds(ScoringLimits, *[st.integers(1, 40)] * 4)


@given(requests_of_any_kind, st.integers(1, 5), limits)
@settings(max_examples=60)
def test_requests_together_get_the_scores_that_each_gets_alone(requests, batch_size: int, limits: ScoringLimits) -> None:
    expected = [[alone(TWIN, context or [7], c, N_POSITIONS) for c in choices] for context, choices in requests]
    found = log_likelihoods(MODEL, [Request(*request) for request in requests], batch_size=batch_size, limits=limits)
    assert_close(found, expected)


@pytest.mark.parametrize("n", [1, 5, 15, 16, 17, 18, 40])
@pytest.mark.parametrize("choices", [[[1]], [[1], [2]], [[1, 2, 3], [1, 2, 4, 5, 6], [1]], [[3] * 16, [3] * 7, [2]]])
def test_contexts_shorter_and_longer_than_all_positions(n: int, choices: list[list[int]]) -> None:
    context = random.Random(n).choices(range(VOCAB_SIZE), k=n)
    expected = [[alone(TWIN, context, choice, N_POSITIONS) for choice in choices]]
    assert_close(log_likelihoods(MODEL, [Request(context, choices)]), expected)


def test_greedy_continuations_are_recognised() -> None:
    context = [1, 2, 3]
    greedy = MODEL.generate(torch.tensor([context]), max_new_tokens=6, stop_at_eot=False)[0, 3:].tolist()
    wrong_at_the_end = [*greedy[:-1], (greedy[-1] + 1) % VOCAB_SIZE]
    wrong_at_the_start = [(greedy[0] + 1) % VOCAB_SIZE, *greedy[1:]]
    [scores] = log_likelihoods(MODEL, [Request(context, [greedy, wrong_at_the_end, wrong_at_the_start, greedy[:1]])])
    assert [score.is_greedy for score in scores] == [True, False, False, True]


def test_a_continuation_longer_than_the_window_is_scored_by_half_windows() -> None:
    context, continuation = [1, 2, 3], random.Random(0).choices(range(VOCAB_SIZE), k=37)
    expected = 0.0
    for start in range(0, 37, 8):
        part = continuation[start : start + 8]
        expected += alone(TWIN, context + continuation[:start], part, N_POSITIONS).log_prob
    [[score, short]] = log_likelihoods(MODEL, [Request(context, [continuation, [5]])], batch_size=3)
    assert score.log_prob == pytest.approx(expected, abs=1e-4) and score.n_tokens == 37
    assert short.log_prob == pytest.approx(alone(TWIN, context, [5], N_POSITIONS).log_prob, abs=1e-5)


def test_1024_positions() -> None:
    model = random_model(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0))
    twin, draw = transformers_twin(model), random.Random(1).choices
    requests = [Request(draw(range(50), k=n), [draw(range(50), k=3), draw(range(50), k=9)]) for n in (1500, 1024, 1016)]
    expected = [[alone(twin, list(r.context), list(c), 1024) for c in r.continuations] for r in requests]
    assert_close(log_likelihoods(model, requests), expected)


def test_shared_tokens_are_computed_once_and_logits_only_where_scored() -> None:
    model = watched(MODEL)
    log_likelihoods(model, [Request([1] * 9, [[2, 3, 4, 5], [2, 3, 5, 6], [2, 3, 6, 7]])])
    tokens = [shape.numel() for shape in model.inputs]
    assert tokens == [9 + 2 + 3] * 2, "ids and positions: the context, the common prefix, then one more token of each"
    assert [shape.numel() for shape in model.scored] == [3 + 3]
    model.inputs.clear()
    log_likelihoods(model, [Request([1] * 9, [[2], [3], [4]]), Request([1] * 8, [[5, 6]])])
    tokens = [shape.numel() for shape in model.inputs]
    assert tokens == [2 * 9] * 2, "each request needs 9 inputs: the last token of a continuation is only a target"


def test_many_choices_take_several_rows_none_longer_than_a_window() -> None:
    model = watched(MODEL)
    context, choices = [1, 2, 3, 4, 5, 6], [[n, n, 3, 2, 1] for n in range(11)] * 3
    [scores] = log_likelihoods(model, [Request(context, choices)], batch_size=2)
    assert max(width for _, width in model.inputs) <= N_POSITIONS
    assert_close([scores], [[alone(TWIN, context, choice, N_POSITIONS) for choice in choices]])


def test_dtypes_are_kept_wide_enough() -> None:
    request = Request([1, 2, 3], [[4, 5], [6]])
    [in_float64] = log_likelihoods(random_model(TINY, dtype=torch.float64), [request])
    [in_bfloat16] = log_likelihoods(random_model(TINY, dtype=torch.bfloat16), [request])
    expected = alone(transformers_twin(random_model(TINY, dtype=torch.float64)), [1, 2, 3], [4, 5], N_POSITIONS)
    assert in_float64[0].log_prob == pytest.approx(expected.log_prob, abs=1e-10)
    assert in_bfloat16[0].log_prob == pytest.approx(expected.log_prob, abs=0.2)


def test_progress_and_modes() -> None:
    model = random_model(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=None)).train()
    done: list[int] = []
    requests = [Request([1, 2], [[3], [4]]), Request([1], [[3, 4, 5]])]
    first = log_likelihoods(model, requests, batch_size=1, progress=done.append)
    assert sum(done) == 3 and model.training, "the mode is restored"
    assert first == log_likelihoods(model, requests, batch_size=1), "no dropout"
    assert log_likelihoods(model, []) == [] and log_likelihoods(model, [Request([1], [])]) == [[]]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([1], [[]]), "a continuation is empty"),
        (Request([], [[1]]), "no bos_token_id"),
        (Request([1], [[11]]), "token id 11 is outside"),
        (Request([1, -3], [[1]]), "token id -3 is outside"),
    ],
)
def test_each_mistake_is_an_error_that_names_it(request_: Request, words: str) -> None:
    model = random_model(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=None))
    with pytest.raises(InputError, match=words):
        log_likelihoods(model, [request_])
    with pytest.raises(ConfigError, match="batch_size=0"):
        log_likelihoods(model, [], batch_size=0)


def test_damaged_weights_are_an_error() -> None:
    model = random_model(TINY)
    with torch.no_grad():
        model.ln_f.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="NaN"):
        log_likelihoods(model, [Request([1], [[1]])])
