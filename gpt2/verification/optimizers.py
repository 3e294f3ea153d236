"""Optimizer steps, gradient clipping and the learning-rate schedule: NumPy against PyTorch and the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from gpt2.reference import numpy_optimizers
from gpt2.training import optimizer as trainer_optimizer
from gpt2.verification.checks import BY_DTYPE, FLOAT64, Check, Pair
from gpt_config.training_config import TrainingConfig

_STEPS = 5  # optimizer steps per check
_RATE = 0.01  # learning rate
_MAX_NORM = 1.0  # limit of gradient clipping


def optimizer_checks() -> Iterator[Check]:
    """The checks of all optimizers, of clipping and of the schedule."""
    for name, (ours, theirs) in _OPTIMIZERS.items():
        for dtype, tolerance in BY_DTYPE.items():
            yield Check(f"{name}, 5 steps", "NumPy", "PyTorch", dtype, tolerance, partial(_steps, ours, theirs, dtype))
    yield Check("gradient clipping", "NumPy", "PyTorch", "float64", FLOAT64, _clipping)
    yield Check("warm-up and cosine", "NumPy", "PyTorch", "float64", FLOAT64, _schedule)


def _module(dtype: str) -> nn.Module:
    """A module with a matrix and a vector, because AdamW decays matrices only."""
    module = nn.Linear(5, 3).to(getattr(torch, dtype))
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(rng.standard_normal(tuple(parameter.shape))))
    return module


def _gradients(module: nn.Module, rng: np.random.Generator) -> dict[str, Any]:
    gradients = {}
    for name, parameter in module.named_parameters():
        gradients[name] = rng.standard_normal(tuple(parameter.shape)).astype(str(parameter.dtype).removeprefix("torch."))
        parameter.grad = torch.from_numpy(gradients[name].copy())
    return gradients


def _steps(ours: Callable[..., Any], theirs: Callable[[nn.Module], torch.optim.Optimizer], dtype: str) -> Iterator[Pair]:
    module, rng = _module(dtype), np.random.default_rng(1)
    parameters = {name: parameter.detach().numpy().copy() for name, parameter in module.named_parameters()}
    numpy_side, torch_side = ours(parameters), theirs(module)
    for step in range(1, _STEPS + 1):
        gradients = _gradients(module, rng)
        numpy_side.step(gradients, _RATE)
        torch_side.step()
        for name, parameter in module.named_parameters():
            yield f"{name} after step {step}", parameters[name], parameter.detach()


def _trainers_adamw(module: nn.Module) -> torch.optim.Optimizer:
    return trainer_optimizer.make_optimizer(
        module, TrainingConfig(learning_rate=_RATE, beta1=0.9, beta2=0.95, weight_decay=0.1)
    )


_OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "SGD": (
        lambda p: numpy_optimizers.SGD(p, momentum=0.0, nesterov=False),
        lambda module: torch.optim.SGD(module.parameters(), _RATE),
    ),
    "SGD with Nesterov momentum": (
        lambda p: numpy_optimizers.SGD(p, momentum=0.9, nesterov=True),
        lambda module: torch.optim.SGD(module.parameters(), _RATE, momentum=0.9, nesterov=True),
    ),
    "Adam": (numpy_optimizers.Adam, lambda module: torch.optim.Adam(module.parameters(), _RATE)),
    "AdamW": (lambda p: numpy_optimizers.AdamW(p, betas=(0.9, 0.95), weight_decay=0.1), _trainers_adamw),
}


def _clipping() -> Iterator[Pair]:
    for scale in (0.01, 10.0):  # below and above the limit
        module = _module("float64")
        gradients = _gradients(module, np.random.default_rng(2))
        for name, parameter in module.named_parameters():
            gradients[name] *= scale
            assert parameter.grad is not None
            parameter.grad *= scale
        norm = numpy_optimizers.clip_gradients(gradients, _MAX_NORM)
        yield f"norm, scale {scale}", norm, nn.utils.clip_grad_norm_(module.parameters(), _MAX_NORM)
        for name, parameter in module.named_parameters():
            yield f"{name}, scale {scale}", gradients[name], parameter.grad


def _schedule() -> Iterator[Pair]:
    sizes = {"learning_rate": 0.003, "min_learning_rate": 0.0002, "warmup_steps": 7, "max_steps": 40}
    config = TrainingConfig(**sizes)  # type: ignore[arg-type]
    ours = [numpy_optimizers.warmup_cosine(step, **sizes) for step in range(45)]  # type: ignore[arg-type]
    yield "45 steps", ours, [trainer_optimizer.learning_rate(config, step) for step in range(45)]
