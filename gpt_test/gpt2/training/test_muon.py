"""Newton-Schulz steps against an SVD, steps of Muon against the formula in float64, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2 import GPT2
from gpt2.training import Trainer
from gpt2.training.checkpoint import load_checkpoint
from gpt2.training.muon import COEFFICIENTS, newton_schulz
from gpt2.training.optimizer import make_optimizer
from gpt_config import ConfigError, GPT2Config
from gpt_test.gpt2.training.conftest import SIZES, tiny_config

MakeTrainer = Callable[..., Trainer]


def by_svd(matrix: np.ndarray, n_steps: int = 5) -> np.ndarray:
    """U f(S) V^T: the polynomial is applied to the singular values, not to the matrix."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(n_steps):
        values = sum(c * values**power for c, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    return left * values @ right


@pytest.mark.parametrize("shape", [(5, 5), (12, 3), (3, 40), (64, 64)])
@pytest.mark.parametrize("n_steps", [1, 5])
def test_newton_schulz_steps_are_a_polynomial_of_the_singular_values(shape: tuple[int, int], n_steps: int) -> None:
    numbers = np.random.default_rng(0)
    matrices = np.stack([numbers.standard_normal(shape), numbers.standard_normal((shape[0], 2)) @ np.ones((2, shape[1]))])
    found = newton_schulz(torch.from_numpy(matrices), n_steps).numpy()
    for one, matrix in zip(found, matrices, strict=True):
        np.testing.assert_allclose(one, by_svd(matrix, n_steps), rtol=0, atol=1e-9)
    assert not newton_schulz(torch.zeros(3, 4)).any()


def test_the_singular_values_come_near_one() -> None:
    values = np.geomspace(0.01, 1, 1000)
    for _ in range(5):
        values = sum(c * values**power for c, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    assert values.min() > 0.65 and values.max() < 1.25


def test_steps_equal_the_formula() -> None:
    """Three steps with given gradients. Embeddings, biases and norms are AdamW's."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=11, **SIZES)).double()
    other = GPT2(model.config).double()
    other.load_state_dict(model.state_dict())
    config = tiny_config(optimizer="muon", momentum=0.9, weight_decay=0.3, learning_rate=0.02)
    ours, theirs = make_optimizer(model, config), make_optimizer(other, tiny_config(weight_decay=0.3, learning_rate=0.02))
    hidden = {name: p for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2}
    expected = {name: p.detach().numpy().copy() for name, p in hidden.items()}
    momentum = {name: np.zeros_like(weight) for name, weight in expected.items()}
    numbers = torch.Generator().manual_seed(1)
    for _ in range(3):
        for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=numbers, dtype=torch.float64)
            twin.grad = parameter.grad.clone()
            if name not in hidden:
                continue
            gradient = parameter.grad.numpy()
            momentum[name] = 0.9 * momentum[name] + gradient
            parts = np.split(gradient + 0.9 * momentum[name], 3 if "c_attn" in name else 1, axis=1)
            size = 0.2 * math.sqrt(max(parts[0].shape))
            expected[name] = (1 - 0.02 * 0.3) * expected[name] - 0.02 * size * np.hstack([by_svd(part) for part in parts])
        ours.step()
        theirs.step()
    assert len(hidden) == 8
    for (name, parameter), twin in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if name in hidden:
            np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=0, atol=1e-9, err_msg=name)
        else:
            assert torch.equal(parameter, twin[1]), name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of PyTorch has no Muon")
def test_a_step_is_near_that_of_pytorch(small_model: GPT2) -> None:
    """PyTorch computes in bfloat16, so the numbers differ by about 1%. It has no queries, keys and values of their own."""
    torch.manual_seed(0)
    ours = torch.nn.ModuleDict({"h": torch.nn.ModuleDict({"0": torch.nn.Linear(24, 32, bias=False)})})
    theirs = torch.nn.Linear(24, 32, bias=False)
    [weight] = ours.parameters()
    theirs.weight.data.copy_(weight.data)
    start = weight.detach().clone()
    settings = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    pairs = (
        (make_optimizer(ours, tiny_config(optimizer="muon", learning_rate=0.1, weight_decay=0.2)), weight),
        (torch.optim.Muon(theirs.parameters(), **settings), theirs.weight),
    )
    for optimizer, parameter in pairs:
        numbers = torch.Generator().manual_seed(1)
        for _ in range(3):
            parameter.grad = torch.randn(32, 24, generator=numbers)
            optimizer.step()
    moved, expected = (parameter.detach() - start for _, parameter in pairs)
    assert ((moved - expected).norm() / expected.norm()).item() < 0.02


def test_the_average_is_that_of_the_formula(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", ema=0.3, max_steps=6)
    average = {name: weight.detach().double() for name, weight in trainer.model.named_parameters()}
    for step in range(6):
        trainer.train_step()
        trainer.step += 1
        decay = min(0.3, (1 + step) / (10 + step))
        for name, weight in trainer.model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * weight.detach().double()
    last = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    loss = trainer.validation_loss()
    trainer.save()
    saved = load_checkpoint(trainer.folder / "checkpoints").tensors
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, last[name]) and torch.equal(saved[f"model.model.{name}"], last[name])
        torch.testing.assert_close(saved[f"ema.model.{name}"].double(), average[name], rtol=0, atol=1e-6)
    plain = make_trainer(tmp_path / "plain", max_steps=6)
    plain.model.load_state_dict({name: weight.float() for name, weight in average.items()})
    assert plain.validation_loss() == pytest.approx(loss, abs=1e-6)


def test_the_folder_has_the_average(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", ema=0.9, keep="last")
    trainer.train()
    saved = load_checkpoint(trainer.folder / "checkpoints").tensors
    for name, weight in GPT2.from_pretrained(tmp_path / "run").named_parameters():
        assert torch.equal(weight, saved[f"ema.model.{name}"]) and not torch.equal(weight, saved[f"model.model.{name}"])


def test_an_average_may_begin_and_end_when_a_run_is_resumed(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run").train()
    begun = make_trainer(tmp_path / "run", ema=0.9, max_steps=16)
    begun.load()
    before = begun.validation_loss()
    assert before == make_loaded(make_trainer, tmp_path / "run").validation_loss()
    begun.train()
    ended = make_loaded(make_trainer, tmp_path / "run")
    assert ended.step == 16 and not any(name.startswith("ema.") for name in saved_names(ended))


def make_loaded(make_trainer: MakeTrainer, folder: Path) -> Trainer:
    trainer = make_trainer(folder, max_steps=20)
    trainer.load()
    return trainer


def saved_names(trainer: Trainer) -> list[str]:
    trainer.save()
    return list(load_checkpoint(trainer.folder / "checkpoints").tensors)


@pytest.mark.parametrize("field", ["optimizer", "ema"])
def test_the_numpy_engine_refuses_them(field: str) -> None:
    from gpt2.training.numpy_trainer import check_settings

    with pytest.raises(ConfigError, match=f"{field}=.* is not supported by engine=numpy"):
        check_settings(tiny_config(**{field: {"optimizer": "muon", "ema": 0.9}[field]}))
