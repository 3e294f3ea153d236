"""Fixtures: a generated text of a few thousand words, its token files, and a function that makes trainers for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.training import Trainer, TrainingData, prepare
from gpt_config import GPT2Config, TrainingConfig

SIZES = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}


def made_up_text(n_words: int = 4000, seed: int = 0) -> str:
    """Return sentences of a small grammar, regular enough for the loss to fall."""
    draw = random.Random(seed)
    words = []
    while len(words) < n_words:
        words += [
            "the",
            draw.choice(["cat", "dog", "owl"]),
            draw.choice(["saw", "fed"]),
            "a",
            draw.choice(["fish.\n", "hen.\n"]),
        ]
    return " ".join(words)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "animals.txt"
    path.write_text(made_up_text())
    return path


@pytest.fixture(scope="session")
def char_data(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return prepare([text_file], tmp_path_factory.mktemp("data"), tokenizer="char")


def tiny_config(**changes: object) -> TrainingConfig:
    fields = dict(
        batch_size=4, context=16, max_steps=12, warmup_steps=2, eval_interval=4, eval_batches=2, checkpoint_interval=4,
        log_interval=1, sample_tokens=0, precision="float32",
    )  # fmt: skip
    return TrainingConfig(**{**fields, **changes})


@pytest.fixture
def make_trainer(char_data: TrainingData, tmp_path: Path) -> Callable[..., Trainer]:
    def make(
        folder: Path = tmp_path / "run", data: TrainingData = char_data, dropout: float = 0.0, **changes: object
    ) -> Trainer:
        config = tiny_config(**changes)
        torch.manual_seed(config.seed)
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
        model = GPT2(GPT2Config(vocab_size=data.train.vocab_size, **SIZES, **rates))
        return Trainer(model, data, config, folder, is_quiet=True)

    return make
