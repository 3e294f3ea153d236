"""The first steps of each kind of run have the losses of a plain loop over transformers' or peft's model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gpt2.adapters.lora import named_lora_parameters
from gpt2.finetuning.classification import Classification
from gpt2.finetuning.run import Finetuning, prepare_finetuning
from gpt2.training import prepare
from gpt2.training.run_logs import read_metrics
from gpt_config import FinetuningConfig

transformers = pytest.importorskip("transformers")

Loss = Callable[[Any], torch.Tensor]
TEXT = "the cat saw the dog go home"
ASK = [("Say cat.", "cat"), ("Say what the dog says.", "the dog says nothing"), ("Go.", "home")]
LABELLED = [("cat", "a cat by the sea"), ("dog", "the old dog went home"), ("cat", "the cat waits")]


def started(folder: Path, base: Path, lines: list[str], **options: Any) -> Finetuning:
    """A run whose every step has all rows, without dropout and without warm-up."""
    data = folder / ("data.txt" if options["task"] == "text" else "data.jsonl")
    data.write_text("\n".join(lines))
    config = FinetuningConfig(
        dropout=0.0, max_steps=3, sample_tokens=0, batch_size=len(lines), precision="float32", learning_rate=0.01, **options
    )
    return prepare_finetuning(base, [data], config, folder / "run", validation_data=[data], is_quiet=True)


def losses_of(run: Finetuning) -> list[float]:
    run.trainer.train()
    return [line["loss"] for line in read_metrics(run.trainer.folder) if "loss" in line]


def losses_of_plain_loop(model: torch.nn.Module, loss_of: Loss, run: Finetuning) -> list[float]:
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in learned if parameter.dim() > 1], "weight_decay": 0.01},
        {"params": [parameter for parameter in learned if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    losses = []
    for line in read_metrics(run.trainer.folder):
        if "loss" not in line:
            continue
        for group in optimizer.param_groups:
            group["lr"] = line["learning_rate"]
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def check(run: Finetuning, model: torch.nn.Module, loss_of: Loss) -> None:
    found = losses_of(run)
    assert len(found) == 3 and found[2] < found[0]
    assert found == pytest.approx(losses_of_plain_loop(model.eval(), loss_of, run), rel=2e-4)


def text_loss(base: Path) -> Loss:
    ids = transformers.AutoTokenizer.from_pretrained(base)(TEXT + "<|endoftext|>", return_tensors="pt").input_ids
    return lambda model: model(ids, labels=ids).loss


def test_text(small_folder: Path, tmp_path: Path) -> None:
    run = started(tmp_path, small_folder, [TEXT], task="text")
    check(run, transformers.AutoModelForCausalLM.from_pretrained(small_folder), text_loss(small_folder))


def test_an_adapter(small_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run = started(tmp_path, small_folder, [TEXT], task="text", lora_rank=3, lora_alpha=6.0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(small_folder), config)
    for name, parameter in named_lora_parameters(run.trainer.model):
        theirs = model.get_parameter(f"base_model.model.transformer.{name}.default.weight")
        theirs.data.copy_(parameter.data)
    check(run, model, text_loss(small_folder))


def test_instructions(small_folder: Path, tmp_path: Path) -> None:
    """Only the responses and the end after each are learned; a batch is the mean over its learned tokens."""
    lines = [json.dumps({"instruction": ask, "output": answer}) for ask, answer in ASK]
    run = started(tmp_path, small_folder, lines, task="instruction", template="plain")
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_folder)

    def loss_of(model: Any) -> torch.Tensor:
        total, n_learned = torch.zeros(()), 0
        for ask, answer in ASK:
            prompt, response = tokenizer(f"{ask}\n").input_ids, tokenizer(f"{answer}<|endoftext|>").input_ids
            logits = model(torch.tensor([prompt + response])).logits[0]
            total = total + F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(response), reduction="sum")
            n_learned += len(response)
        return total / n_learned

    check(run, transformers.AutoModelForCausalLM.from_pretrained(small_folder), loss_of)


def test_classification(small_folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"label": label, "text": text}) for label, text in LABELLED]
    run = started(tmp_path, small_folder, lines, task="classification", test_fraction=0.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(small_folder, num_labels=2)
    assert isinstance(run.trainer.objective, Classification)
    model.score.weight.data.copy_(run.trainer.objective.classifier.score.weight.data)

    def loss_of(model: Any) -> torch.Tensor:
        rows = [(torch.tensor([tokenizer(text).input_ids]), ("cat", "dog").index(label)) for label, text in LABELLED]
        return torch.stack([model(ids, labels=torch.tensor([label])).loss for ids, label in rows]).mean()

    check(run, model, loss_of)


@pytest.fixture
def with_roles(small_folder: Path, tmp_path: Path) -> Path:
    """A model folder whose tokenizer has two more special tokens."""
    folder = tmp_path / "with_roles"
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    model = transformers.AutoModelForCausalLM.from_pretrained(small_folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ROLES = "<|user|>who goes there?<|assistant|> the <|user|> cat, <|endoftext|> the old<|assistant|>"


@pytest.mark.parametrize("special_tokens", [True, False])
def test_ids_of_texts_with_special_tokens(with_roles: Path, tmp_path: Path, special_tokens: bool) -> None:
    """In JSON, <|endoftext|> separates no documents, so it is a special token like others."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": ROLES}))
    data = prepare(
        [path],
        tmp_path / "data",
        tokenizer=str(with_roles),
        special_tokens=special_tokens,
        validation_data=[path],
        workers=1,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(with_roles)
    expected = tokenizer(ROLES, split_special_tokens=not special_tokens).input_ids
    assert data.train.tokens.tolist() == [*expected, tokenizer.eos_token_id]


def test_a_text_with_special_tokens(with_roles: Path, tmp_path: Path) -> None:
    text = ROLES.replace("<|endoftext|>", "")
    run = started(tmp_path, with_roles, [text], task="text", special_tokens=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(with_roles)
    ids = torch.tensor([tokenizer(text + "<|endoftext|>").input_ids])
    check(run, transformers.AutoModelForCausalLM.from_pretrained(with_roles), lambda model: model(ids, labels=ids).loss)
