"""Generation with controls: ids and probabilities are those of transformers, and no fast path changes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2 import GPT2
from gpt2.fast.limits import FastLimits
from gpt2.generation import processors, sampling
from gpt2.generation.batch import Batch
from gpt2.generation.loop import decode, start
from gpt2.generation.processors import Controls, Text
from gpt2.generation.row import Row
from gpt2.generation.steps import GreedyTokens, StepCounts, VerifyDrafts
from gpt_config import GenerationConfig, GPT2Config, InputError
from gpt_test.conftest import random_model, repetitive_model, transformers_twin

CONFIG = GPT2Config(vocab_size=60, n_positions=48, n_embd=30, n_layer=2, n_head=3, eos_token_id=59, bos_token_id=58)
PROMPTS = torch.randint(0, 57, (3, 9), generator=torch.Generator().manual_seed(3))
PROMPTS[0, :4] = PROMPTS[2, :8] = 59  # padding; transformers reads it where it bans repetitions
MASK = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] * 8 + [1]])
N = 14


class Penalties:
    """Frequency and presence penalties for transformers, which has none: a processor of the user."""

    def __init__(self, frequency: float, presence: float) -> None:
        self.frequency, self.presence = frequency, presence

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.stack([row[PROMPTS.shape[1] :].bincount(minlength=scores.shape[1]) for row in ids])
        return scores - counts * self.frequency - (counts > 0) * self.presence


# Options here, and the same for transformers.
CONTROLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "bias": ({"logit_bias": {59: 2.5, 3: -4.0}}, {"sequence_bias": [[[59], 2.5], [[3], -4.0]]}),
    "min": ({"min_new_tokens": 6, "logit_bias": {59: 9.0}}, {"min_new_tokens": 6, "sequence_bias": [[[59], 9.0]]}),
    "ngram": ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
    "bigram": ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    "words": (
        {"bad_words": [[n] for n in range(0, 60, 2)] + [[59]]},
        {"bad_words_ids": [[n] for n in range(0, 60, 2)] + [[59]]},
    ),
    "pairs": (
        {"bad_words": [[n, m] for n in range(60) for m in range(30)]},
        {"bad_words_ids": [[n, m] for n in range(60) for m in range(30)]},
    ),
    "penalties": ({"frequency_penalty": 1.5, "presence_penalty": -0.5}, {"logits_processor": [Penalties(1.5, -0.5)]}),
    "ends": ({"eos_token_id": [59, *range(0, 60, 7)]}, {"eos_token_id": [59, *range(0, 60, 7)]}),
    "ignored": ({"stop_at_eot": False, "logit_bias": {59: 4.0}}, {"eos_token_id": None, "sequence_bias": [[[59], 4.0]]}),
    "all": (
        {
            "logit_bias": {59: 2.0}, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words": [[4], [9, 8]],
            "min_new_tokens": 3,
        },
        {
            "sequence_bias": [[[59], 2.0]], "repetition_penalty": 1.3, "no_repeat_ngram_size": 2,
            "bad_words_ids": [[4], [9, 8]], "min_new_tokens": 3,
        },
    ),
}  # fmt: skip
SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.001, "typical_p": 0.9}


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_model(CONFIG, dtype=torch.float64)


@pytest.fixture(scope="module")
def twin(model: GPT2):
    return transformers_twin(model)


def rows_of(model: GPT2, prompts: list[list[int]], config: GenerationConfig, given: Any = None, **batch: Any) -> list[Row]:
    rows = start(model, prompts, config, processors=processors.as_processors(given))
    for _ in decode(Batch(model, **batch), rows):
        pass
    return rows


@pytest.mark.parametrize("name", CONTROLS)
def test_greedy_ids_of_a_padded_batch_equal_transformers(model: GPT2, twin, name: str) -> None:
    ours, theirs = CONTROLS[name]
    # Of single tokens, transformers bans the padding too.
    options = {"attention_mask": torch.ones_like(MASK) if name == "ngram" else MASK, "max_new_tokens": N}
    expected = twin.generate(PROMPTS, do_sample=False, pad_token_id=59, **options, **theirs)
    made = model.generate(PROMPTS, **options, **ours)
    assert made.tolist() == expected.tolist()
    if name != "none":
        assert made.tolist() != model.generate(PROMPTS, **options).tolist()


@pytest.mark.parametrize("truncation", [{}, {"typical_p": 0.5}, SAMPLED], ids=["plain", "typical", "all"])
@pytest.mark.parametrize("name", ["none", "min", "bigram", "words", "penalties", "all"])
def test_probabilities_equal_transformers(model: GPT2, twin, name: str, truncation: dict[str, float]) -> None:
    """At each step of a padded batch that transformers draws."""
    ours, theirs = CONTROLS[name]
    torch.manual_seed(0)
    drawn = twin.generate(
        PROMPTS, attention_mask=MASK, max_new_tokens=N, pad_token_id=59, do_sample=True, return_dict_in_generate=True,
        output_scores=True, **{"top_k": 0, **truncation}, **theirs,
    )  # fmt: skip
    config = GenerationConfig(do_sample=True, max_new_tokens=N, **truncation, **ours)
    controls, n_prompt = Controls(config, CONFIG.eos_token_ids), PROMPTS.shape[1]
    for step, scores in enumerate(drawn.scores):
        for row in range(3):
            text = drawn.sequences[row, : n_prompt + step][4 * (row == 0) + 8 * (row == 2) :]
            n_before = int(MASK[row].sum())
            if 59 in text[n_before:]:
                continue  # the row has ended
            logits = model(text[None])[:, -1]
            texts = [Text(text.tolist(), n_before, Row([1], config, 9).generator)]
            probs = sampling.logits_to_probs(processors.process(logits, texts, controls), config)
            torch.testing.assert_close(probs[0], scores[row].softmax(-1).double(), atol=1e-6, rtol=0)


def test_tokens_are_drawn_from_these_probabilities(model: GPT2) -> None:
    config = GenerationConfig(do_sample=True, max_new_tokens=N, seed=4, **SAMPLED, **CONTROLS["all"][0])
    [row] = rows_of(model, [[1, 2, 3]], config)
    generator, ids = Row([1, 2, 3], config, 48).generator, [1, 2, 3]
    for token in row.ids:
        texts = [Text(ids, 3, generator)]
        logits = processors.process(model(torch.tensor([ids]))[:, -1], texts, Controls(config, (59,)))
        assert sampling.sample(sampling.logits_to_probs(logits, config), [generator.random()]).item() == token
        ids = [*ids, token]
    assert len(row.ids) > 3


def test_processors_of_transformers_equal_our_controls(model: GPT2) -> None:
    transformers = pytest.importorskip("transformers")
    given = [transformers.NoRepeatNGramLogitsProcessor(2), transformers.NoBadWordsLogitsProcessor([[4], [9, 8]])]
    expected = model.generate(PROMPTS, max_new_tokens=N, no_repeat_ngram_size=2, bad_words=[[4], [9, 8]])
    for listed in (given, transformers.LogitsProcessorList(given)):
        assert model.generate(PROMPTS, max_new_tokens=N, logits_processor=listed).tolist() == expected.tolist()
    beams = {"num_beams": 3, "max_new_tokens": 8}
    expected = model.generate(PROMPTS, no_repeat_ngram_size=2, bad_words=[[4], [9, 8]], **beams)
    assert model.generate(PROMPTS, logits_processor=given, **beams).tolist() == expected.tolist()


def only_even_after_odd(ids: Tensor, logits: Tensor) -> Tensor:
    """A rule that depends on the text: after an odd token come even ones."""
    if ids[0, -1] % 2:
        logits[:, 1::2] = -torch.inf
    return logits


@pytest.mark.parametrize("drafts_of", ["text", "model"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"frequency_penalty": 0.1, "logit_bias": {59: 3.0}, "min_new_tokens": 30, "bad_words": [[2], [1, 4]]}],
    ids=["processor", "controls"],
)
def test_speculation_changes_no_token(drafts_of: str, do_sample: bool, options: dict[str, Any]) -> None:
    model = repetitive_model(CONFIG, dtype=torch.float64)
    draft_model = repetitive_model(CONFIG, seed=1, dtype=torch.float64) if drafts_of == "model" else None
    given = None if options else only_even_after_odd
    plain = {"max_new_tokens": 40, "do_sample": do_sample, "temperature": 0.3, "seed": 2, **options}
    expected = rows_of(model, [[1, 2, 3, 1, 2]], GenerationConfig(**plain), given)
    verified: list[int] = []

    def count(step: object) -> None:
        verified.extend([len(step.drafts)] if isinstance(step, VerifyDrafts) else [])

    costs = FastLimits(costs_of_drafts=(0.0, 0.0))
    config = GenerationConfig(speculate=True, **plain)
    made = rows_of(model, [[1, 2, 3, 1, 2]], config, given, draft_model=draft_model, on_step=count, fast=costs)
    assert made[0].ids == expected[0].ids
    if drafts_of == "text":
        assert verified


def test_rows_of_one_batch_have_their_own_controls_and_processors(model: GPT2) -> None:
    configs = [GenerationConfig(max_new_tokens=N), GenerationConfig(max_new_tokens=N, no_repeat_ngram_size=1)]
    each = [(configs[0], None), (configs[1], None), (configs[0], only_even_after_odd), (configs[0], None)]
    rows = [
        row for config, given in each for row in start(model, [[1, 2]], config, processors=processors.as_processors(given))
    ]
    for _ in decode(Batch(model), rows):
        pass
    assert [row.ids for row in rows] == [rows_of(model, [[1, 2]], config, given)[0].ids for config, given in each]
    assert len({tuple(row.ids) for row in rows}) == 3


def test_several_greedy_tokens_are_computed_once_no_control_needs_the_logits() -> None:
    model = random_model(CONFIG)
    for options, runs in (({}, True), ({"min_new_tokens": 5}, True), ({"presence_penalty": 0.1}, False)):
        counts = StepCounts()
        config = GenerationConfig(max_new_tokens=40, stop_at_eot=not runs, **options)
        [row] = rows_of(model, [[1, 2]], config, on_step=counts)
        assert len(row.ids) > 10 and (GreedyTokens.name in counts.by_name) == runs, options
        if "min_new_tokens" in options:
            assert str(counts).startswith("prefill 1, one token per row 4, several greedy tokens")


def test_an_error_of_the_controls_leaves_the_rows_as_they_were(model: GPT2) -> None:
    """The text [1, 2] has no token left; after it has ended, the other row continues as it would alone."""
    calls: list[int] = []

    def refuse(ids: Tensor, logits: Tensor) -> Tensor:
        calls.append(ids.shape[1])
        return logits.fill_(-torch.inf) if ids[0, :2].tolist() == [1, 2] and ids.shape[1] > 4 else logits

    config = GenerationConfig(max_new_tokens=N, stop_at_eot=False)
    rows = start(model, [[1, 2], [3, 4, 5]], config, processors=(refuse,))
    batch = Batch(model)
    with pytest.raises(InputError, match="the controls exclude every token: logits_processor leave none"):
        for _ in decode(batch, rows):
            pass
    assert [len(row.ids) for row in rows] == [3, 3]
    rows[0].finish_reason = "stop"
    while batch.rows:
        for _ in batch.step():
            pass
    assert rows[1].ids == rows_of(model, [[3, 4, 5]], config)[0].ids and calls


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=["greedy", "sampled", "beams"])
def test_max_time_ends_a_row_with_the_token_that_exceeds_it(model: GPT2, options: dict[str, Any]) -> None:
    times = iter(range(100))
    fast = FastLimits(clock=lambda: float(next(times)), use_plan=False)  # a second passes with each look at the clock
    config = GenerationConfig(max_new_tokens=N, max_time=3.5, stop_at_eot=False, **options)
    [row] = rows_of(model, [[1, 2]], config, fast=fast)
    assert (len(row.ids), row.finish_reason) == (4, "time")
    [row] = rows_of(model, [[1, 2]], GenerationConfig(max_new_tokens=2, max_time=60, stop_at_eot=False, **options))
    assert (len(row.ids), row.finish_reason) == (2, "length")
