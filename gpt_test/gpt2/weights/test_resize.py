"""New special tokens: ids, rows of the embedding, folders that transformers reads, and adapters that peft reads."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.adapters.files import read_adapter, save_adapter
from gpt2.adapters.lora import add_lora
from gpt2.quantization.quantize import quantize_int8
from gpt2.weights.resize import add_special_tokens
from gpt2.weights.tokenizer import load_tokenizer_for
from gpt_config import ConfigError, GPT2Config, InputError, LoRAConfig
from gpt_encoder import CharTokenizer, GPT2Tokenizer, load_tokenizer
from gpt_test.conftest import random_model
from gpt_test.gpt2.adapters.conftest import fill

NEW = ("<|user|>", "<|assistant|>")
TEXT = "the cat <|user|>saw<|assistant|> boats"


def test_the_new_rows_are_the_mean_and_the_head_is_tied(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    model = copy.deepcopy(small_model).double()
    old = model.wte.weight.detach().clone()
    ids = torch.tensor([[1, 5, 2]])
    before = model(ids).detach()
    tokenizer = small_tokenizer.with_special_tokens(NEW)
    model.resize(tokenizer)
    n = small_tokenizer.vocab_size
    assert [tokenizer.special_tokens[text] for text in NEW] == [n, n + 1] and model.config.vocab_size == n + 2
    assert model.wte.weight.shape == (n + 2, old.shape[1]) and torch.equal(model.wte.weight[:n], old)
    mean = torch.tensor([sum(column) / n for column in old.T.tolist()], dtype=torch.float64)
    torch.testing.assert_close(model.wte.weight[n:], mean.expand(2, -1), atol=1e-15, rtol=0)
    after = model(ids).detach()
    torch.testing.assert_close(after[..., :n], before, atol=1e-12, rtol=0)
    torch.testing.assert_close(after[..., n], before.mean(-1), atol=1e-9, rtol=0)
    logits = model(torch.tensor([[1, n]]))[0, -1]
    assert torch.equal(model.generate(torch.tensor([[1, n]]), max_new_tokens=1)[0, 2], logits.argmax())


def test_random_rows_are_those_of_the_seed() -> None:
    rows = []
    for seed in (1, 1, 2):
        model = random_model(GPT2Config(vocab_size=50, n_positions=8, n_embd=64, n_layer=1, n_head=1, initializer_range=0.3))
        model.resize(90, new_rows="random", seed=seed)
        rows.append(model.wte.weight[50:])
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert rows[0].std().item() == pytest.approx(0.3, rel=0.1) and abs(rows[0].mean().item()) < 0.03
    model.resize(60)
    assert torch.equal(model.wte.weight[50:], rows[2][:10]) and model(torch.tensor([[59]])).shape == (1, 1, 60)


def test_rows_that_fill_up_a_matrix_are_used_first(small_tokenizer: GPT2Tokenizer) -> None:
    """A model of nanoGPT may have 50,304 rows for 50,257 ids. The new tokens have the ids of transformers."""
    n = small_tokenizer.vocab_size
    model = random_model(GPT2Config(vocab_size=n + 7, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    old = model.wte.weight.detach().clone()
    tokenizer = add_special_tokens(model, small_tokenizer, NEW)
    assert model.config.vocab_size == n + 7 and tokenizer.vocab_size == n + 2
    torch.testing.assert_close(model.wte.weight[n : n + 2], old[:n].mean(0).expand(2, -1))
    assert torch.equal(model.wte.weight[n + 2 :], old[n + 2 :])
    model.resize(tokenizer)
    assert model.config.vocab_size == n + 7
    assert add_special_tokens(model, tokenizer, NEW).special_tokens == tokenizer.special_tokens


def test_transformers_reads_the_same_model_and_ids(small_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = GPT2.from_pretrained(small_folder)
    tokenizer = add_special_tokens(model, load_tokenizer_for(model), NEW)
    with torch.no_grad():
        model.wte.weight[-1] += 0.5
    model.save_pretrained(tmp_path / "new", tokenizer=tokenizer)
    ids = tokenizer.encode(TEXT, allowed_special="all")
    assert set(ids) >= {tokenizer.vocab_size - 2, tokenizer.vocab_size - 1}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert theirs(TEXT)["input_ids"] == ids and theirs.decode(ids, skip_special_tokens=True) == "the cat saw boats"
    assert len(theirs) == tokenizer.vocab_size
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    with torch.no_grad():
        torch.testing.assert_close(loaded(torch.tensor([ids])).logits, model(torch.tensor([ids])), atol=1e-5, rtol=0)
    again = load_tokenizer(tmp_path / "new")
    assert again.special_tokens == tokenizer.special_tokens and again.encode(TEXT, allowed_special="all") == ids
    assert torch.equal(GPT2.from_pretrained(tmp_path / "new").wte.weight, model.wte.weight)


def test_an_adapter_has_the_new_rows(small_folder: Path, tmp_path: Path) -> None:
    model = GPT2.from_pretrained(small_folder)
    tokenizer = add_special_tokens(model, load_tokenizer_for(model), NEW)
    add_lora(model, LoRAConfig(rank=2, modules_to_save=("wte",)))
    fill([parameter for parameter in model.parameters() if parameter.requires_grad])
    save_adapter(model, tmp_path / "adapter", base_model=small_folder, tokenizer=tokenizer)
    ids = torch.tensor([tokenizer.encode(TEXT, allowed_special="all")])
    merged = GPT2.from_pretrained(tmp_path / "adapter", dtype="float64")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).float(), model(ids), atol=1e-4, rtol=1e-5)
    assert load_tokenizer_for(merged).special_tokens == tokenizer.special_tokens
    assert read_adapter(tmp_path / "adapter").config.to_dict()["modules_to_save"] == ["wte", "lm_head"]
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(small_folder)
    base.resize_token_embeddings(len(transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-4, rtol=1e-5)


def test_what_cannot_be_resized_is_refused(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    model = copy.deepcopy(small_model)
    with pytest.raises(InputError, match="'a' is already an ordinary token"):
        small_tokenizer.with_special_tokens(["<|a|>", "a"])
    with pytest.raises(InputError, match="cannot be added to a vocabulary of characters"):
        CharTokenizer("ab").with_special_tokens(["<|a|>"])
    with pytest.raises(ConfigError, match="new_rows='zero' must be one of mean, random"):
        model.resize(1000, new_rows="zero")
    with pytest.raises(ConfigError, match="rows=0 must be"):
        model.resize(0)
    with pytest.raises(InputError, match="would cut off the end token"):
        model.resize(2)
    assert torch.equal(model.wte.weight, small_model.wte.weight)
    quantize_int8(model)
    with pytest.raises(InputError, match="in int8, whose embedding cannot be resized"):
        model.resize(1000)


def test_the_names_in_the_files_are_those_of_transformers(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.with_special_tokens(NEW).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == list(NEW)
