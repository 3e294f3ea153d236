"""Speculative decoding gives the ids of plain decoding with any drafts, and takes fewer steps if drafts are accepted."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import GPT2, KVCache, complete, stream
from gpt2.generation.batch import Batch
from gpt2.generation.decoder import Decoder
from gpt2.generation.draft_model import DraftModel, check_vocabularies
from gpt2.generation.loop import decode, start
from gpt2.generation.speculation import Drafter, PromptLookup, Speculation
from gpt2.generation.window import Window
from gpt_config import CheckpointError, ConfigError, GenerationConfig, GPT2Config, InputError
from gpt_encoder import train_bpe
from gpt_test.conftest import TRAINING_TEXT, repetitive_model

V = 24
CONFIG = GPT2Config(vocab_size=V, n_positions=32, n_embd=12, n_layer=2, n_head=2, eos_token_id=V - 1)


@pytest.fixture(scope="module")
def model() -> GPT2:
    return repetitive_model(CONFIG, dtype=torch.float64)


@pytest.fixture(scope="module", params=[1, 3, 20, 64], ids="draft model of context {}".format)
def draft_model(request: pytest.FixtureRequest) -> GPT2:
    """A draft model that is similar to `model`, as far as its context allows: often right, and often wrong."""
    config = GPT2Config(vocab_size=V, n_positions=request.param, n_embd=12, n_layer=2, n_head=2)
    draft_model = repetitive_model(config, dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(draft_model.parameters(), repetitive_model(CONFIG).parameters(), strict=True):
            ours[: len(theirs)] = theirs[: len(ours)]
        draft_model.wte.weight.mul_(1 + 0.02 * torch.randn(V, 1, generator=torch.Generator().manual_seed(1)))
    return draft_model


@contextmanager
def eager(seed: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Draft a random number of tokens at every step, whatever they cost. Yields the list of (drafted, accepted)."""
    numbers, verified = random.Random(seed), []

    def draft(self: Speculation, ids: list[int], room: int, generator: random.Random) -> list[int]:
        n_drafts = min(room, numbers.randrange(10))
        return self._drafter.propose(ids, n_drafts, generator) if n_drafts > 0 and self._drafter.evidence(ids) else []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Speculation, "draft", draft)
        patch.setattr(Speculation, "verified", lambda _, *counts: verified.append(counts))
        yield verified


def new_rows(
    model: GPT2,
    prompts: list[list[int]],
    *,
    draft_model: GPT2 | None = None,
    use_cache: bool = True,
    make_speculation: Callable[[Drafter, tuple[float, float]], Speculation] = Speculation,
    **options,
):
    """Return (ids, finish_reason) of each row, and the log-probabilities of each row."""
    config = GenerationConfig(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some prompts are longer than the context on purpose
        rows = start(model, prompts, config, logprobs=True)
    batch = Batch(model, draft_model=draft_model, use_cache=use_cache, make_speculation=make_speculation)
    for advanced in decode(batch, rows):
        assert advanced
    assert all(len(row.ids) == len(row.logprobs) for row in rows)
    return [(row.ids, row.finish_reason) for row in rows], [row.logprobs for row in rows]


options_strategy = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 80),
        "do_sample": st.booleans(),
        "temperature": st.sampled_from([0.1, 0.3, 0.6, 1.5]),
        "top_k": st.sampled_from([None, 3]),
        "top_p": st.sampled_from([None, 0.8]),
        "min_p": st.sampled_from([None, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "stop_at_eot": st.booleans(),
        "seed": st.integers(0, 99),
    }
)
prompt_strategy = st.lists(st.integers(0, V - 2), min_size=1, max_size=40)


def assert_the_same(rows, expected) -> None:
    assert rows[0] == expected[0]
    for ours, theirs in zip(rows[1], expected[1], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)


@given(prompt=prompt_strategy, options=options_strategy)
@settings(max_examples=40)
def test_prompt_lookup_changes_nothing(model: GPT2, prompt: list[int], options: dict) -> None:
    expected = new_rows(model, [prompt], **options)
    assert_the_same(new_rows(model, [prompt], speculate=True, **options), expected)
    with eager(options["seed"]):
        assert_the_same(new_rows(model, [prompt], speculate=True, **options), expected)


@given(prompt=prompt_strategy, options=options_strategy)
@settings(max_examples=10)
def test_a_draft_model_changes_nothing(model: GPT2, draft_model: GPT2, prompt: list[int], options: dict) -> None:
    expected = new_rows(model, [prompt], **options)
    assert_the_same(new_rows(model, [prompt], draft_model=draft_model, **options), expected)
    with eager(options["seed"]):
        assert_the_same(new_rows(model, [prompt], draft_model=draft_model, **options), expected)


@pytest.mark.parametrize("draft_model", [20, 64], indirect=True)
def test_drafts_are_accepted_rejected_and_accepted_in_part(model: GPT2, draft_model: GPT2) -> None:
    """Otherwise the tests above would cover little. A draft model with a shorter context has too little room for this."""
    for options in ({"draft_model": draft_model, "temperature": 0.6}, {"speculate": True, "temperature": 0.15}):
        with eager() as verified:
            new_rows(model, [[1, 2, 3]], do_sample=True, seed=2, max_new_tokens=300, stop_at_eot=False, **options)
        assert any(n_taken == n_drafts > 1 for n_drafts, n_taken in verified)
        assert any(n_taken == 0 for _, n_taken in verified)
        assert any(0 < n_taken < n_drafts for n_drafts, n_taken in verified)


@given(prompts=st.lists(prompt_strategy, min_size=2, max_size=4), options=options_strategy)
@settings(max_examples=15)
def test_a_batch_is_the_same_and_its_last_row_too(model: GPT2, prompts: list[list[int]], options: dict) -> None:
    """Rows end at different times. The last one is padded, and gets drafts once it is alone."""
    options |= {"temperature": 1.5, "stop_at_eot": True}
    expected = new_rows(model, prompts, **options)
    with eager(options["seed"]):
        assert_the_same(new_rows(model, prompts, speculate=True, **options), expected)


def test_the_padded_last_row_of_a_batch_gets_drafts(model: GPT2) -> None:
    config = GenerationConfig(max_new_tokens=24, stop_at_eot=False)
    alone = new_rows(model, [[5, 5, 5]], max_new_tokens=24, stop_at_eot=False)[0][0][0]
    rows = start(model, [[1, 2, 3, 4, 5, 6, 7], [5, 5, 5]], config)
    with eager() as verified:
        for _ in decode(Batch(model, draft_model=copy.deepcopy(model)), rows):
            rows[0].finish_reason = "stop"
    assert rows[1].ids == alone
    assert sum(n_taken for _, n_taken in verified) > 5


def test_a_seed_keeps_the_models_distribution() -> None:
    """Compare texts of three tokens, from a vocabulary of three, with their exact probabilities; another model drafts."""
    config = GPT2Config(vocab_size=3, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    model, other = (
        repetitive_model(config, seed=3, dtype=torch.float64),
        repetitive_model(config, seed=4, dtype=torch.float64),
    )
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    with torch.no_grad():
        logits = model(torch.cat([torch.full((27, 1), 1), texts], dim=1))[:, :-1].double() / 1.2
    probs = logits.log_softmax(-1).gather(-1, texts[..., None])[..., 0].sum(-1).exp()
    assert probs.sum().item() == pytest.approx(1)
    n, counts = 1500, torch.zeros(27)
    with eager() as verified:
        for seed in range(n):
            options = {"do_sample": True, "temperature": 1.2, "seed": seed, "max_new_tokens": 3}
            a, b, c = new_rows(model, [[1]], draft_model=other, **options)[0][0][0]
            counts[9 * a + 3 * b + c] += 1
    assert sum(n_taken for _, n_taken in verified) > 0.3 * n
    statistic = ((counts - n * probs) ** 2 / (n * probs)).sum().item()
    assert statistic < 26 + 5 * (2 * 26) ** 0.5


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_draft_model_that_is_the_model_is_always_right(do_sample: bool) -> None:
    """It draws with the random numbers of the model, so that few forward passes of the model are needed."""

    def free(drafter: Drafter, costs: tuple[float, float]) -> Speculation:
        drafter.cost = lambda n_drafts: 0.0
        return Speculation(drafter, costs)

    model = repetitive_model(replace(CONFIG, n_positions=512), dtype=torch.float64)
    options = {"do_sample": do_sample, "seed": 1, "temperature": 2.0, "repetition_penalty": 1.2, "stop_at_eot": False}
    expected = new_rows(model, [[1, 2]], max_new_tokens=400, **options)
    draft_model, passes = copy.deepcopy(model), []
    model.ln_f.register_forward_hook(lambda _, __, x: passes.append(x.shape[1]))
    options |= {"max_new_tokens": 400, "draft_model": draft_model, "make_speculation": free}
    assert_the_same(new_rows(model, [[1, 2]], **options), expected)
    assert sum(passes) == 401  # the prompt and all tokens but the last: every computed token is used
    assert len(passes) < 35


def test_repetitive_text_takes_few_forward_passes(model: GPT2) -> None:
    model = repetitive_model(replace(CONFIG, n_positions=256), dtype=torch.float64)
    passes: list[int] = []
    model.ln_f.register_forward_hook(lambda _, __, x: passes.append(x.shape[1]))
    options = {"repetition_penalty": 0.5, "max_new_tokens": 200, "stop_at_eot": False}
    ids = new_rows(model, [[1, 2, 3]], speculate=True, **options)[0][0][0]
    assert ids[-60:-30] == ids[-30:], "the test needs a text that repeats itself"
    assert len(passes) < 60


class Recorded(Speculation):
    """Speculation that records (drafted, accepted) of each step with drafts. `drafter` replaces that of the batch."""

    def __init__(self, costs: tuple[float, float], drafter: Drafter) -> None:
        super().__init__(drafter, costs)
        self.steps: list[tuple[int, int]] = []

    def verified(self, n_drafts: int, n_taken: int) -> None:
        self.steps.append((n_drafts, n_taken))
        super().verified(n_drafts, n_taken)


@dataclass
class FromText:
    """Drafts made by a rule from the text that is known to follow."""

    rule: Callable[[int, list[int]], list[int]]  # (length of the text so far, the next tokens) -> drafts
    text: list[int]

    def evidence(self, ids: list[int]) -> int:
        return 4

    def cost(self, n_drafts: int) -> float:
        return 0.0

    def propose(self, ids: list[int], n_drafts: int, generator: random.Random) -> list[int]:
        return self.rule(len(ids), self.text[len(ids) : len(ids) + n_drafts])


def test_drafts_that_are_always_wrong_change_nothing_and_cost_little(model: GPT2) -> None:
    options = {"max_new_tokens": 600, "stop_at_eot": False}
    expected = new_rows(model, [[1, 2]], **options)
    always_wrong = FromText(lambda _, right: [(token + 1) % V for token in right], [1, 2, *expected[0][0][0]])
    options |= {"speculate": True}
    with eager():
        made = new_rows(model, [[1, 2]], make_speculation=lambda _, costs: Speculation(always_wrong, costs), **options)
        assert_the_same(made, expected)
    recorded: list[Recorded] = []

    def record(_: Drafter, costs: tuple[float, float]) -> Speculation:
        recorded.append(Recorded(costs, always_wrong))
        return recorded[-1]

    assert_the_same(new_rows(model, [[1, 2]], make_speculation=record, **options), expected)
    verified = recorded[0].steps
    assert len(verified) > 3 and all(n_taken == 0 for _, n_taken in verified)
    assert sum(0.4 + 0.11 * n for n, _ in verified) < 0.02 * 600


def test_no_drafts_are_made_if_they_cannot_gain() -> None:
    """For example, two drafts that cost two steps gain nothing."""
    lookup = PromptLookup(1000)
    text = [1, 2, 3, 1, 2, 3]
    assert [len(Speculation(lookup, (1.5, 0.25)).draft(text, room, random.Random())) for room in (1, 2, 3, 4)] == [
        0,
        0,
        0,
        4,
    ]
    assert len(Speculation(lookup, (0.5, 0.1)).draft(text, 1, random.Random())) == 1


def naive_lookup(ids: list[int], n_drafts: int) -> list[int]:
    for n in (4, 3, 2):
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[-n:]:
                text = ids.copy()
                for place in range(end, end + n_drafts):
                    text.append(text[place])
                return text[len(ids) :]
    return []


@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=60), data=st.data())
def test_prompt_lookup_finds_the_latest_of_the_longest_matches(ids: list[int], data: st.DataObject) -> None:
    """Also if the text has grown by several tokens since the last call, and if the match reaches the end of the text."""
    lookup = PromptLookup(1000)
    for length in sorted(data.draw(st.sets(st.integers(1, len(ids)), min_size=1, max_size=8))):
        text, n_drafts = ids[:length], data.draw(st.integers(1, 9))
        found = lookup.propose(text, n_drafts, random.Random()) if lookup.evidence(text) else []
        assert found == naive_lookup(text, n_drafts)


def test_of_a_long_prompt_only_the_part_that_the_model_sees_is_searched() -> None:
    lookup = PromptLookup(10)
    assert lookup.evidence([1, 2, 3, *range(10, 20), 1, 2]) == 0
    assert lookup.evidence([1, 2, 3, *range(10, 20), 1, 2, 10, 1, 2]) == 2


@given(data=st.data())
@settings(max_examples=40)
def test_a_draft_model_drafts_its_own_greedy_tokens(draft_model: GPT2, data: st.DataObject) -> None:
    """For any earlier drafts, and any number of accepted ones. No other test checks the cache of the draft model."""
    limit = draft_model.config.n_positions
    drafter = DraftModel(draft_model, draft_model, lambda logits, texts, generators: logits.argmax(-1).tolist())
    text = data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=30))
    for n_drafts in data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8)):
        if not drafter.evidence(text):
            assert limit == 1
            return
        drafts = drafter.propose(text, n_drafts, random.Random())
        assert len(drafts) == min(n_drafts, limit // 2)
        seen = text[drafter._offset :]  # the part that the draft model has seen
        assert drafter._offset == 0 or limit // 2 <= len(seen) <= limit - len(drafts) + 1
        decoder = Decoder(draft_model, [Window(seen.copy(), limit)], len(drafts), use_cache=False)
        for token in drafts:
            assert decoder.next_logits().argmax() == token
            decoder.windows[0].ids.append(token)
        n_taken = data.draw(st.integers(0, len(drafts)))
        text = text + drafts[:n_taken] + data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=3))


def test_a_draft_that_makes_the_model_compute_nan_does_no_harm(model: GPT2) -> None:
    """The token that causes NaN is in drafts only, so plain decoding never computes it."""
    options = {"max_new_tokens": 60, "stop_at_eot": False}
    expected = new_rows(model, [[1, 2]], **options)
    absent = next(token for token in range(3, V) if token not in expected[0][0][0])
    broken = copy.deepcopy(model)
    broken.wte.register_forward_hook(lambda _, ids, x: x.masked_fill((ids[0] == absent)[..., None], torch.nan))
    drafter = FromText(lambda length, right: right if length % 2 else [*right[:-1], absent], [1, 2, *expected[0][0][0]])
    options |= {"speculate": True, "make_speculation": lambda _, costs: Speculation(drafter, costs)}
    with eager() as verified:
        assert_the_same(new_rows(broken, [[1, 2]], **options), expected)
    assert any(n_taken for _, n_taken in verified)


@pytest.mark.parametrize("speculate", [False, True])
def test_a_token_that_makes_the_model_compute_nan_raises_after_that_token(model: GPT2, speculate: bool) -> None:
    ids = new_rows(model, [[1, 2]], max_new_tokens=60, stop_at_eot=False)[0][0][0]
    config = GenerationConfig(max_new_tokens=60, stop_at_eot=False, speculate=speculate)
    last = ids[-1]
    broken, seen = copy.deepcopy(model), []
    broken.wte.register_forward_hook(lambda _, ids, x: x.masked_fill((ids[0] == last)[..., None], torch.nan))
    rows = start(broken, [[1, 2]], config)
    with eager(), pytest.raises(CheckpointError, match=r"^the model computes NaN"):
        for _ in decode(Batch(broken), rows):
            seen = rows[0].ids.copy()
    assert seen == ids[: ids.index(last) + 1]


def test_damaged_draft_models_are_reported(model: GPT2) -> None:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.ln_f.bias[0] = torch.nan
    with eager(), pytest.raises(CheckpointError, match=r"^the draft model: the model computes NaN"):
        new_rows(model, [[1, 2]], draft_model=damaged)


def test_a_model_in_training_mode_verifies_drafts_without_dropout(model: GPT2) -> None:
    options = {"max_new_tokens": 60, "speculate": True, "stop_at_eot": False}
    expected = new_rows(model, [[1, 2]], **options)
    trained = copy.deepcopy(model).train()
    with eager() as verified:
        assert_the_same(new_rows(trained, [[1, 2]], draft_model=model, **options), expected)
    assert trained.training and any(n_taken for _, n_taken in verified)


def test_without_a_cache_it_is_plain_decoding(model: GPT2) -> None:
    options = {"max_new_tokens": 60, "stop_at_eot": False}
    with eager() as verified:
        assert_the_same(
            new_rows(model, [[1]], use_cache=False, speculate=True, **options), new_rows(model, [[1]], **options)
        )
    assert not verified


@given(seed=st.integers(0, 30), data=st.data())
@settings(max_examples=20)
def test_texts_stop_strings_and_streams_are_the_same(small_model, small_tokenizer, seed: int, data) -> None:
    model = copy.deepcopy(small_model).double()
    options = {"do_sample": True, "temperature": 0.4, "seed": seed, "max_new_tokens": 60}
    whole = complete(model, small_tokenizer, "The cat", **options)[0].text
    at = data.draw(st.integers(0, max(0, len(whole) - 3)))
    options["stop"] = data.draw(st.sampled_from([(), (whole[at : at + 3] or "x", whole[at + 1 : at + 3] or "y")]))
    expected = complete(model, small_tokenizer, "The cat", **options)[0]
    with eager(seed):
        found = complete(model, small_tokenizer, "The cat", speculate=True, **options)[0]
        pieces = list(stream(model, small_tokenizer, "The cat", draft_model=model, **options))
    for name in ("text", "ids", "finish_reason"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-9)
    assert "".join(pieces) == expected.text


@pytest.mark.parametrize("end", [20, 21, 22, 23])
def test_tokens_are_yielded_singly_and_a_row_can_be_ended_between_them(model: GPT2, end: int) -> None:
    config = GenerationConfig(max_new_tokens=60, stop_at_eot=False)
    rows = start(model, [[1, 2]], config)
    with eager():
        for step, advanced in enumerate(decode(Batch(model, draft_model=copy.deepcopy(model)), rows), 1):
            assert advanced == rows and len(rows[0].ids) == step
            if step == end:
                rows[0].finish_reason = "stop"
    assert rows[0].ids == new_rows(model, [[1, 2]], max_new_tokens=60, stop_at_eot=False)[0][0][0][:end]


def test_generate_accepts_speculate_and_a_draft_model(model: GPT2, draft_model: GPT2) -> None:
    ids = torch.tensor([[1, 2, 3]])
    expected = model.generate(ids, max_new_tokens=50)
    assert torch.equal(model.generate(ids, max_new_tokens=50, speculate=True), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=50, draft_model=draft_model), expected)


def test_speculation_and_beam_search_exclude_each_other(model: GPT2) -> None:
    for options in ({"speculate": True}, {"draft_model": model}):
        with pytest.raises(ConfigError, match=r"num_beams=2 .* choose one"):
            model.generate(torch.tensor([[1]]), num_beams=2, **options)


def test_a_draft_model_of_another_vocabulary_is_refused(model, small_model, small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^the draft model has a vocabulary of 300 tokens and the model has 24: use a"):
        model.generate(torch.tensor([[1]]), draft_model=small_model)
    other = train_bpe([TRAINING_TEXT[::-1]], vocab_size=300)
    small_model.save_pretrained(tmp_path, tokenizer=other)
    ours, theirs = GPT2.from_pretrained(small_folder), GPT2.from_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=f"{tmp_path.name} has 300 tokens like the model, but not the same tokens"
    ) as caught:
        stream(ours, train_bpe([TRAINING_TEXT], vocab_size=300), "The cat", draft_model=theirs).send(None)
    assert "\n" not in str(caught.value)
    check_vocabularies(ours, theirs, other)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), data=st.data())
@settings(max_examples=25)
def test_a_truncated_cache_gives_the_logits_of_the_kept_tokens(model: GPT2, lengths: list[int], data) -> None:
    cache, kept = KVCache(CONFIG, dtype=torch.float64), []
    for length in lengths:
        kept += (new := data.draw(st.lists(st.integers(0, V - 1), min_size=length, max_size=length)))
        with torch.no_grad():
            logits = model(torch.tensor([new]), kv_cache=cache)[0, -1]
            torch.testing.assert_close(logits, model(torch.tensor([kept]))[0, -1], atol=1e-10, rtol=0)
        del kept[data.draw(st.integers(0, len(kept))) :]
        cache.truncate(len(kept))
        assert cache.length == len(kept)
    for length in (-1, cache.length + 1):
        with pytest.raises(InputError, match=f"cannot be cut to {length}"):
            cache.truncate(length)
