"""The decode loop: greedy ids equal those of transformers; batches, caches and the sliding window change no row."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.generation.batch import Batch
from gpt2.generation.loop import decode, start
from gpt_config import CheckpointError, ConfigError, GenerationConfig, GPT2Config, InputError, InputTypeError
from gpt_test.conftest import random_model, transformers_twin

CONFIG = GPT2Config(vocab_size=60, n_positions=48, n_embd=30, n_layer=2, n_head=3, eos_token_id=59, bos_token_id=58)


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_model(CONFIG, dtype=torch.float64)


@pytest.fixture(scope="module")
def twin(model: GPT2):
    return transformers_twin(model)


def new_ids(model: GPT2, prompts: list[list[int]], *, use_cache: bool = True, **options) -> list[list[int]]:
    config = GenerationConfig(**options)
    rows = start(model, prompts, config)
    for _ in decode(Batch(model, use_cache=use_cache), rows):
        pass
    return [row.ids for row in rows]


prompts_strategy = st.lists(st.lists(st.integers(0, 57), min_size=1, max_size=30), min_size=1, max_size=5)


@given(prompt=st.lists(st.integers(0, 57), min_size=1, max_size=20), penalty=st.sampled_from([1.0, 1.3, 0.8]))
@settings(max_examples=25)
def test_greedy_ids_equal_transformers(model: GPT2, twin, prompt: list[int], penalty: float) -> None:
    ids = torch.tensor([prompt])
    expected = twin.generate(ids, max_new_tokens=25, do_sample=False, pad_token_id=59, repetition_penalty=penalty)
    ours = model.generate(ids, max_new_tokens=25, repetition_penalty=penalty)
    assert ours.tolist() == expected.tolist()


def test_a_padded_batch_equals_transformers(model: GPT2, twin) -> None:
    ids = torch.randint(0, 58, (4, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :11] = 0, 0
    expected = twin.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=59)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=20).tolist() == expected.tolist()


@given(prompts=prompts_strategy, seed=st.integers(0, 99), do_sample=st.booleans(), n=st.integers(1, 40))
@settings(max_examples=30)
def test_a_row_is_the_same_alone_in_a_batch_and_without_cache(model, prompts, seed, do_sample, n) -> None:
    """Prompts with new tokens exceed the context of 48, so windows slide and rows end at different times."""
    options = {"do_sample": do_sample, "seed": seed, "max_new_tokens": n, "temperature": 1.5, "top_k": 40}
    batch = new_ids(model, prompts, **options)
    assert batch == new_ids(model, prompts, use_cache=False, **options)
    assert batch == [new_ids(model, [prompt], **options)[0] for prompt in prompts]


def test_the_window_slides_past_the_context(model: GPT2) -> None:
    """The rule, written out: the model sees at most 48 tokens; if there are 49, all but the last 24 are dropped."""
    prompt = list(range(40))
    visible_ids, expected = prompt.copy(), []
    with torch.no_grad():
        for _ in range(150):
            if len(visible_ids) > 48:
                visible_ids = visible_ids[-24:]
            token = model(torch.tensor([visible_ids]))[0, -1].argmax().item()
            visible_ids.append(token)
            expected.append(token)
    assert new_ids(model, [prompt], max_new_tokens=150, stop_at_eot=False) == [expected]


@pytest.mark.parametrize("n_positions", [1, 2, 3])
def test_the_smallest_contexts_slide_too(n_positions: int) -> None:
    model = random_model(
        GPT2Config(vocab_size=11, n_positions=n_positions, n_embd=4, n_layer=1, n_head=2), dtype=torch.float64
    )
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompts = [[1, 2, 3, 4], [5]]
        ids = new_ids(model, prompts, **options)
        assert ids == new_ids(model, prompts, use_cache=False, **options)
    assert list(map(len, ids)) == [12, 12]


def test_of_a_long_prompt_the_end_is_used_with_a_warning(model: GPT2) -> None:
    prompt = [n % 58 for n in range(70)]
    with pytest.warns(UserWarning, match="a prompt has 70 tokens and the model sees 48: it continues the last 48"):
        ids = new_ids(model, [prompt], max_new_tokens=5)
    assert ids == new_ids(model, [prompt[-48:]], max_new_tokens=5)


def test_samples_of_one_prompt_differ_and_are_reproducible(model: GPT2) -> None:
    options = {"do_sample": True, "seed": 5, "num_return_sequences": 4, "max_new_tokens": 12}
    first = new_ids(model, [[1, 2], [3]], **options)
    assert first == new_ids(model, [[1, 2], [3]], **options)
    assert len({tuple(ids) for ids in first}) == 8
    assert first[4:] == new_ids(model, [[3]], **options)  # samples do not depend on the other prompts of the batch
    assert first[:1] == new_ids(model, [[1, 2]], **{**options, "num_return_sequences": 1})
    assert first != new_ids(model, [[1, 2], [3]], **{**options, "seed": 6})


def test_without_a_seed_samples_differ(model: GPT2) -> None:
    options = {"do_sample": True, "max_new_tokens": 20, "temperature": 2.0}
    assert new_ids(model, [[1]], **options) != new_ids(model, [[1]], **options)


def test_samples_follow_the_models_distribution(model: GPT2) -> None:
    n = 4000
    tokens = torch.tensor(new_ids(model, [[1, 2, 3]], do_sample=True, seed=0, max_new_tokens=1, num_return_sequences=n))
    with torch.no_grad():
        probs = model(torch.tensor([[1, 2, 3]]))[0, -1].softmax(-1)
    assert probs.min() > 5 / n, "the test needs an expected count above 5 for every token"
    statistic = ((tokens[:, 0].bincount(minlength=60) - n * probs) ** 2 / (n * probs)).sum().item()
    degrees = 59
    assert statistic < degrees + 6 * (2 * degrees) ** 0.5


def test_temperature_zero_is_greedy(model: GPT2) -> None:
    greedy = new_ids(model, [[4, 5]], max_new_tokens=10)
    assert greedy == new_ids(model, [[4, 5]], max_new_tokens=10, do_sample=True, temperature=0.0)
    assert greedy == new_ids(model, [[4, 5]], max_new_tokens=10, do_sample=True, temperature=1e-9)
    assert greedy == new_ids(model, [[4, 5]], max_new_tokens=10, do_sample=True, top_k=1)


def test_it_stops_at_end_of_text(model: GPT2) -> None:
    """Each row ends by itself; generate() pads the rows that ended earlier."""
    options = {"do_sample": True, "temperature": 3.0, "seed": 0, "num_return_sequences": 6, "max_new_tokens": 40}
    rows = new_ids(model, [[1]], **options)
    lengths = [len(ids) for ids in rows]
    assert len(set(lengths)) > 1, "the test needs rows of different lengths"
    for ids in rows:
        assert 59 not in ids[:-1] and (ids[-1] == 59 or len(ids) == 40)
    out = model.generate(torch.tensor([[1]]), **options)
    assert out.shape == (6, 1 + max(lengths))
    for row, ids in zip(out.tolist(), rows, strict=True):
        assert row == [1, *ids] + [59] * (max(lengths) - len(ids))
    assert any(59 in ids[:-1] for ids in new_ids(model, [[1]], **options, stop_at_eot=False))


def test_an_empty_prompt_starts_from_bos(model: GPT2) -> None:
    out = model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=5)
    assert out.tolist() == new_ids(model, [[58]], max_new_tokens=5)
    without_bos = random_model(GPT2Config(vocab_size=10, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(InputError, match="no bos_token_id"):
        without_bos.generate(torch.zeros(1, 0, dtype=torch.long))


def test_with_no_new_tokens_the_prompt_is_returned(model: GPT2) -> None:
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)
    assert torch.equal(model.generate(ids, max_new_tokens=0, num_beams=2), ids)


def test_logprobs_are_the_models_own(model: GPT2, twin) -> None:
    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=5, seed=3, max_new_tokens=30, stop_at_eot=False)
    rows = start(model, [[1, 2, 3], [7]], config, logprobs=True)
    for _ in decode(Batch(model), rows):
        pass
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.ids])
        with torch.no_grad():
            expected = twin(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row.logprobs).double(), expected[-len(row.ids) :], atol=1e-6, rtol=0)


def test_a_reader_can_end_a_row(model: GPT2) -> None:
    config = GenerationConfig(max_new_tokens=20, stop_at_eot=False)
    rows = start(model, [[1], [2], [3]], config)
    for step, advanced in enumerate(decode(Batch(model), rows)):
        assert all(row.finish_reason is None or step == 19 for row in advanced)
        if step == 4:
            rows[1].finish_reason = "stop"
    assert [len(row.ids) for row in rows] == [20, 5, 20]
    assert rows[0].ids == new_ids(model, [[1]], max_new_tokens=20, stop_at_eot=False)[0]


def test_options_override_the_config(model: GPT2) -> None:
    out = model.generate(torch.tensor([[1]]), GenerationConfig(max_new_tokens=50), max_new_tokens=3)
    assert out.shape[1] <= 4


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([[60]], {}, InputError, "token id 60 is outside the vocabulary of this model: ids go from 0 to 59"),
        ([[1, -2]], {}, InputError, "token id -2"),
        ([[1.0]], {}, InputError, "of int64"),
        ([1], {}, InputError, "\\(batch, tokens\\)"),
        ([[1]], {"temperature": float("nan")}, ConfigError, "temperature=nan"),
        ([[1]], {"top_k": -1}, ConfigError, "top_k=-1"),
        ([[1]], {"bad_words": ["word"]}, ConfigError, "bad_words='word' needs a tokenizer: use gpt2.complete"),
        ([[1]], {"bad_words": [[1, 60]]}, InputError, "token id 60 is outside the vocabulary"),
        ([[1]], {"logit_bias": {61: 1.0}}, InputError, "token id 61 is outside the vocabulary"),
        ([[1]], {"eos_token_id": [1, 62]}, InputError, "token id 62 is outside the vocabulary"),
        ([[1]], {"top_logprobs": 2}, InputError, "top_logprobs are not ids: use gpt2.complete"),
        ([[1]], {"inputs_embeds": torch.zeros(1, 1, 30)}, InputError, "exclude each other"),
        ([[1]], {"stop": ("a",)}, InputError, "need a tokenizer"),
        ([[1]], {"max_tokens": 5}, ConfigError, "^max_tokens=5 is not an option of generation: use max_new_tokens"),
        ([[1]], {"attention_mask": torch.ones(1, 2)}, InputError, "attention_mask has shape"),
    ],
)
def test_bad_input_is_one_clear_line(model: GPT2, arguments, options, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        model.generate(torch.tensor(arguments), **options)
    assert "\n" not in str(caught.value)


def test_prompts_that_are_not_tensors_are_refused(model: GPT2) -> None:
    with pytest.raises(InputTypeError, match="not str"):
        model.generate("text")


def test_damaged_weights_are_reported(small_config: GPT2Config) -> None:
    model = random_model(small_config)
    with torch.no_grad():
        model.ln_f.bias[0] = torch.nan
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        with pytest.raises(CheckpointError, match="NaN"):
            model.generate(torch.tensor([[1]]), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_generates(small_config: GPT2Config, dtype: torch.dtype) -> None:
    model = random_model(small_config).to(dtype)
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=60, do_sample=True, seed=0, stop_at_eot=False).shape == (
        1,
        62,
    )


def test_a_model_in_training_mode_generates_without_dropout(small_config: GPT2Config) -> None:
    model = random_model(small_config)
    expected = model.generate(torch.tensor([[1, 2]]), max_new_tokens=10)
    model.train()
    assert torch.equal(model.generate(torch.tensor([[1, 2]]), max_new_tokens=10), expected)
    assert model.training


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_penalty_is_too_extreme(small_config: GPT2Config, penalty: float, dtype: torch.dtype) -> None:
    model = random_model(small_config).to(dtype)
    for do_sample in (True, False):
        options = {"repetition_penalty": penalty, "do_sample": do_sample, "seed": 0}
        assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=10, **options).max() < 300


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_prompt_may_contain_ids_that_may_not_be_chosen(model: GPT2, num_beams: int) -> None:
    """The repetition penalty then applies to ids beyond `vocab_size`."""
    config = GenerationConfig(max_new_tokens=5, repetition_penalty=1.5, num_beams=num_beams, stop_at_eot=False)
    rows = start(model, [[57, 3]], config)
    for _ in decode(Batch(model, vocab_size=20), rows):
        pass
    assert len(rows[0].ids) == 5 and max(rows[0].ids) < 20


@pytest.mark.slow
def test_a_type_checker_sees_a_misspelt_option(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api", reason="mypy is not installed (pip install -r requirements-dev.txt)")
    calls = (
        "GPT2.from_pretrained('gpt2').generate(torch.tensor([[1]]), {}=3)",
        "complete(GPT2.from_pretrained('gpt2'), load_tokenizer('gpt2'), 'a', {}=3)",
        "stream(GPT2.from_pretrained('gpt2'), load_tokenizer('gpt2'), 'a', {}=3)",
    )
    head = "import torch\nfrom gpt2 import GPT2, complete, stream\nfrom gpt_encoder import load_tokenizer\n"
    for option, is_fine in (("max_new_tokens", True), ("max_new_token", False)):
        file = tmp_path / f"{option}.py"
        file.write_text(head + "\n".join(call.format(option) for call in calls))
        report, _, _ = api.run(["--follow-imports=silent", str(file)])
        assert report.count(f'Unexpected keyword argument "{option}"') == (0 if is_fine else 3), report
