"""The optimizer and the learning-rate schedules. Depends on parameters and the configuration, not on data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gpt2.training.muon import Muon, is_hidden_matrix
from gpt_config.training_config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW, or Muon with AdamW, for the trainable parameters of `model`, with weight decay for matrices only.

    Biases and the gains of layer norms do not decay, because they have no reason to be small. Muon is for the matrices of
    the blocks.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    hidden = {name: p for name, p in named.items() if config.optimizer == "muon" and is_hidden_matrix(name, p)}
    parameters = [parameter for name, parameter in named.items() if name not in hidden]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    kinds = {parameter.device.type for parameter in parameters}
    betas = config.beta1, config.beta2
    is_fused = kinds <= {"cpu", "cuda"}  # one kernel for all parameters, where PyTorch has one
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=is_fused)
    return Muon(
        hidden, groups, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=config.momentum, betas=betas,
        fused=is_fused,
    )  # fmt: skip


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of `step` (from 0): linear warm-up, then `config.schedule` down to the lowest rate.

    cosine is SGDR (Loshchilov and Hutter 2016) without restarts, the schedule of GPT (Radford et al. 2018, section 4.1).
    wsd keeps the highest rate and falls in the last `n_decay` steps only (warm-up, stable, decay: Hu et al. 2024, MiniCPM,
    section 4). So a run can go on with more steps from a checkpoint before the decay, as if it had been that long. Its
    default shape is 1 - sqrt(part), the best one in Hagele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond
    Fixed Training Durations", section 3.
    """
    highest, lowest, n_warmup = config.learning_rate, config.lowest_rate, config.n_warmup
    if step < n_warmup:
        return highest * (step + 1) / (n_warmup + 1)
    if step >= config.max_steps:
        return lowest
    n_falling = config.n_decay if config.schedule == "wsd" else config.max_steps - n_warmup
    part = (step - (config.max_steps - n_falling)) / n_falling if n_falling else 0.0
    if part < 0 or not n_falling or config.schedule == "constant":
        return highest
    shape = config.decay_shape if config.schedule == "wsd" else config.schedule
    return lowest + (highest - lowest) * _SHAPES[shape](part)


# The height above the lowest rate, from 1 to 0, at a part of the decay, from 0 to 1.
_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
    "linear": lambda part: 1 - part,
    "sqrt": lambda part: 1 - math.sqrt(part),
}
