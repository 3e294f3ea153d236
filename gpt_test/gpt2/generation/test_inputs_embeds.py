"""Generation from embeddings in place of ids: new ids equal those of transformers, and those after the embedded ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt2 import GPT2
from gpt_config import GPT2Config, InputError, InputTypeError
from gpt_test.conftest import random_model, repetitive_model, transformers_twin

CONFIG = GPT2Config(vocab_size=60, n_positions=48, n_embd=30, n_layer=2, n_head=3, eos_token_id=59, bos_token_id=58)
IDS = torch.randint(0, 57, (3, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] * 8 + [1]])


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_model(CONFIG, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 2, "repetition_penalty": 1.3}, {"repetition_penalty": 1.3}, {"min_new_tokens": 9}],
    ids=str,
)
def test_new_ids_equal_transformers(model: GPT2, options: dict[str, Any]) -> None:
    embeds = torch.randn(3, 9, 30, generator=torch.manual_seed(1), dtype=torch.float64)
    # With padding, transformers leaves as many new tokens out of this penalty as the row has padding.
    mask = torch.ones_like(MASK) if "repetition_penalty" in options else MASK
    same = {"attention_mask": mask, "max_new_tokens": 20, **options}
    expected = transformers_twin(model).generate(inputs_embeds=embeds, do_sample=False, pad_token_id=59, **same)
    assert model.generate(inputs_embeds=embeds, **same).tolist() == expected.tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_embeddings_of_tokens_continue_as_the_tokens_do(model: GPT2, use_cache: bool) -> None:
    """Past the context, too: the window then drops the older embeddings."""
    options = {"attention_mask": MASK, "max_new_tokens": 80, "stop_at_eot": False, "use_cache": use_cache}
    expected = model.generate(IDS, **options)[:, 9:]
    assert model.generate(inputs_embeds=model.wte(IDS), **options).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_in_16_bits(dtype: torch.dtype) -> None:
    """The model computes them in its dtype, and the plan the tokens after them. The first new id is a most probable one."""
    model = random_model(CONFIG).to(dtype)
    ids = model.generate(inputs_embeds=model.wte(IDS), attention_mask=MASK, max_new_tokens=80, stop_at_eot=False)
    assert ids.shape == (3, 80)
    with torch.inference_mode():
        logits = model(IDS, attention_mask=MASK)[:, -1].float()
    assert (logits.gather(1, ids[:, :1])[:, 0] >= logits.amax(1) - 0.05 * logits.std(1)).all()


def test_drafts_and_samples_of_embeddings() -> None:
    model = repetitive_model(CONFIG, dtype=torch.float64)
    embeds = model.wte(torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3]]))
    for options in ({}, {"do_sample": True, "seed": 1, "num_return_sequences": 2, "temperature": 0.3}):
        plain = model.generate(inputs_embeds=embeds, max_new_tokens=30, **options)
        assert model.generate(inputs_embeds=embeds, max_new_tokens=30, speculate=True, **options).tolist() == plain.tolist()
        assert plain.shape == (options.get("num_return_sequences", 1), 30)
        assert model.generate(inputs_embeds=embeds.repeat(2, 1, 1), max_new_tokens=30, **options)[-1:].tolist() == (
            plain[-1:].tolist()
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids must be a tensor, not None"),
        ({"inputs_embeds": torch.zeros(1, 2, 31)}, r"has shape \(1, 2, 31\) and dtype torch.float32: it must be .*, 30\)"),
        ({"inputs_embeds": torch.zeros(1, 2, 30, dtype=torch.int64)}, "of floating-point numbers"),
        ({"inputs_embeds": torch.zeros(1, 49, 30)}, "has 49 vectors and the model sees 48"),
        ({"inputs_embeds": torch.zeros(1, 0, 30)}, "a prompt of inputs_embeds has no vectors"),
        ({"inputs_embeds": torch.zeros(1, 2, 30), "attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
    ],
)
def test_wrong_embeddings_are_one_line(model: GPT2, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, InputTypeError), match=message) as caught:
        model.generate(**arguments)
    assert "\n" not in str(caught.value)


def test_embeddings_need_the_model_itself(model: GPT2) -> None:
    embeds = torch.zeros(1, 2, 30)
    with pytest.raises(InputTypeError, match="inputs_embeds must be a tensor"):
        model.generate(inputs_embeds=[[0.0]])
    with pytest.raises(InputError, match="a draft_model could read"):
        model.generate(inputs_embeds=embeds, draft_model=model)
    changed = random_model(CONFIG)
    changed.forward = lambda *args, **kwargs: None
    with pytest.raises(InputError, match="cannot be used with hooks on the model or another forward"):
        changed.generate(inputs_embeds=embeds)
