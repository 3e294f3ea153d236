"""Vectors of texts: transformers' hidden states, pooled; the same in every batch, and one line for a wrong call."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gpt2 import GPT2
from gpt2.evaluation import embed
from gpt_config import CheckpointError, ConfigError, GPT2Config, GPT2Warning, InputError
from gpt_encoder import CharTokenizer, GPT2Tokenizer
from gpt_test.conftest import TRAINING_TEXT, random_model, transformers_twin

TEXTS = ["the cat", "a", "Every day the cat went down to the water", "", "the small dog by the sea", "the cat"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_layers_are_those_of_transformers(
    small_config: GPT2Config, small_tokenizer: GPT2Tokenizer, pooling: str, seed: int
) -> None:
    """Layer i is hidden_states[i], for i below 0 too, of each text alone. The empty text is the bos token."""
    config = dataclasses.replace(small_config, n_layer=2 + seed, scale_attn_by_inverse_layer_idx=bool(seed))
    model = random_model(config, seed, positions=0.3)
    twin = transformers_twin(model)
    rows = [small_tokenizer.encode(text) or [config.bos_token_id] for text in TEXTS]
    with torch.no_grad():
        states = [twin(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in rows]
    for layer in range(-config.n_layer - 1, config.n_layer + 1):
        expected = [of_text[layer][0].mean(0) if pooling == "mean" else of_text[layer][0, -1] for of_text in states]
        found = embed(model, small_tokenizer, TEXTS, pooling=pooling, layer=layer, batch_size=4)
        assert found.dtype == torch.float32 and found.shape == (len(TEXTS), config.n_embd)
        assert (found - torch.stack(expected)).abs().max() < 1e-5, layer


def test_the_batch_changes_nothing(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    small_model.train()  # dropout is off all the same, and the mode stays
    try:
        first = embed(small_model, small_tokenizer, TEXTS, normalize=True)
        assert small_model.training
    finally:
        small_model.eval()
    for size in (1, 2, 5):
        assert torch.allclose(first, embed(small_model, small_tokenizer, TEXTS, normalize=True, batch_size=size), atol=1e-6)
    assert torch.equal(first[0], first[-1]) and torch.allclose(first.norm(dim=1), torch.ones(len(TEXTS)))
    plain = embed(small_model, small_tokenizer, TEXTS)
    assert torch.allclose(plain / plain.norm(dim=1, keepdim=True), first, atol=1e-6)
    assert embed(small_model, small_tokenizer, []).shape == (0, 24)
    torch.nn.Linear(24, 2)(first).sum().backward()  # it may be the input of a model that is trained


def test_the_end_of_a_long_text_is_not_read(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    ids = small_tokenizer.encode(TRAINING_TEXT)
    cut = small_tokenizer.decode(ids[:40])
    assert len(ids) > 40 == len(small_tokenizer.encode(cut))
    with pytest.warns(GPT2Warning, match=r"1 of 2 texts are longer than the 40 positions .* \(the first is text 2\)"):
        long, short = embed(small_model, small_tokenizer, [cut, TRAINING_TEXT], pooling="last")
    assert torch.equal(long, short)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 3}, "layer=3 must be a whole number from 0"),
        ({"layer": -4}, "layer=-4 must be"),
        ({"layer": True}, "layer=True must be"),
        ({"pooling": "max"}, "pooling='max' must be one of mean, last"),
        ({"batch_size": 0}, "batch_size=0 must be"),
    ],
)
def test_a_wrong_option_is_named(small_model: GPT2, small_tokenizer: GPT2Tokenizer, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        embed(small_model, small_tokenizer, ["a"], **options)


def test_a_wrong_text_is_named(small_model: GPT2, small_tokenizer: GPT2Tokenizer, small_config: GPT2Config) -> None:
    with pytest.raises(TypeError, match="put it into a list"):
        embed(small_model, small_tokenizer, "a")
    model = random_model(dataclasses.replace(small_config, bos_token_id=None))
    with pytest.raises(InputError, match="text 2 is empty, and this model has no token to begin with"):
        embed(model, small_tokenizer, ["a", ""])
    with pytest.raises(InputError, match="text 2: the character 'x'"):
        embed(model, CharTokenizer("ab"), ["a", "x"])
    with torch.no_grad():
        model.wte.weight[small_tokenizer.encode("a")[0]] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        embed(model, small_tokenizer, ["a"])
