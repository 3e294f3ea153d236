"""The NumPy engine trains like PyTorch's: the same batches, weights and schedule give the same losses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.reference.numpy_model import NumpyGPT2
from gpt2.training import Trainer, TrainingData
from gpt2.training.numpy_trainer import NumpyTrainer
from gpt2.training.run_logs import read_metrics
from gpt_config import ConfigError, GPT2Config
from gpt_test.gpt2.training.conftest import SIZES, tiny_config


def models(data: TrainingData, dtype: str, dropout: float = 0.0) -> tuple[GPT2, NumpyGPT2]:
    torch.manual_seed(0)
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    model = GPT2(GPT2Config(vocab_size=data.tokenizer.vocab_size, **SIZES, **rates)).to(getattr(torch, dtype))
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return model, NumpyGPT2(model.config, weights, dtype=dtype)


def curve(trainer: Trainer | NumpyTrainer, n_steps: int) -> Iterator[tuple[float, float]]:
    for trainer.step in range(n_steps):
        yield trainer.train_step()


def test_both_engines_have_the_same_losses(char_data: TrainingData, tmp_path: Path) -> None:
    torch_model, numpy_model = models(char_data, "float64")
    config = tiny_config(max_steps=50, learning_rate=3e-3)
    torch_trainer = Trainer(torch_model, char_data, config, tmp_path / "torch")
    numpy_trainer = NumpyTrainer(numpy_model, char_data, config, tmp_path / "numpy")
    expected, found = list(curve(torch_trainer, 50)), list(curve(numpy_trainer, 50))
    assert expected[0][0] - expected[-1][0] > 0.5, "the loss did not fall, so the comparison means nothing"
    for (loss, norm), (torch_loss, torch_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(torch_loss, abs=1e-9, rel=0)
        assert norm == pytest.approx(torch_norm, abs=1e-8, rel=0)
    assert numpy_trainer.validation_loss() == pytest.approx(torch_trainer.validation_loss(), abs=1e-6)  # float32


def test_a_run_writes_its_folder(char_data: TrainingData, tmp_path: Path) -> None:
    _, model = models(char_data, "float32", dropout=0.1)
    stopped = NumpyTrainer(
        model, char_data, tiny_config(sample_tokens=5, sample_prompt="the"), tmp_path, is_quiet=True
    ).train()
    assert stopped.step == 12
    lines = read_metrics(tmp_path)
    evaluations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 4, 8, 12]
    assert evaluations[-1]["validation_loss"] < evaluations[0]["validation_loss"]
    assert all(line["sample"].startswith("the") for line in evaluations)
    best = GPT2.from_pretrained(tmp_path)  # PyTorch runs what NumPy trained
    trainer = Trainer(best, char_data, tiny_config(), tmp_path / "again")
    assert trainer.validation_loss() == pytest.approx(stopped.best_loss, abs=1e-5)


def test_a_continued_run_equals_an_uninterrupted_one(char_data: TrainingData, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    _, model = models(char_data, "float32", dropout=0.1)
    NumpyTrainer(model, char_data, tiny_config(), whole, is_quiet=True).train()
    _, model = models(char_data, "float32", dropout=0.1)
    NumpyTrainer(model, char_data, tiny_config(), part, is_quiet=True).train()
    (part / "checkpoints" / "step-00000012.safetensors").unlink()
    _, model = models(char_data, "float32", dropout=0.1)
    trainer = NumpyTrainer(model, char_data, tiny_config(), part, is_quiet=True)
    trainer.load()
    assert trainer.step == 8
    trainer.train()
    names = ("step", "loss", "validation_loss", "gradient_norm")
    kept = [
        [{name: line[name] for name in names if name in line} for line in read_metrics(place)] for place in (whole, part)
    ]
    assert kept[0] == kept[1]


def test_one_engine_continues_from_the_checkpoint_of_the_other(char_data: TrainingData, tmp_path: Path) -> None:
    torch_model, numpy_model = models(char_data, "float32")
    Trainer(torch_model, char_data, tiny_config(), tmp_path, is_quiet=True).train()
    expected = [line for line in read_metrics(tmp_path) if "loss" in line and line["step"] > 8]
    (tmp_path / "checkpoints" / "step-00000012.safetensors").unlink()
    trainer = NumpyTrainer(numpy_model, char_data, tiny_config(), tmp_path, is_quiet=True)
    trainer.load()
    trainer.train()
    found = [line for line in read_metrics(tmp_path) if "loss" in line and line["step"] > 8]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulation", 2),
        ("compile", True),
        ("precision", "bfloat16"),
        ("gradient_checkpointing", True),
        ("sharding", "fsdp"),
    ],
)
def test_settings_for_pytorch_only_are_refused(char_data: TrainingData, tmp_path: Path, name: str, value: object) -> None:
    _, model = models(char_data, "float32")
    with pytest.raises(ConfigError, match=f"{name}={value} is not supported by engine=numpy"):
        NumpyTrainer(model, char_data, tiny_config(**{name: value}), tmp_path)
