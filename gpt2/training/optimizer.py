"""AdamW and its learning-rate schedule. Depends on parameters and the configuration, not on data."""

from __future__ import annotations

import math

import torch
from torch import nn

from gpt_config.training_config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW for the trainable parameters of `model`, with weight decay for matrices only.

    Biases and the gains of layer norms do not decay, because they have no reason to be small.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    kinds = {parameter.device.type for parameter in parameters}
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=kinds <= {"cpu", "cuda"},  # one kernel for all parameters, where PyTorch has one
    )


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of `step` (from 0): linear warm-up, then half a cosine down to the minimum.

    This is SGDR (Loshchilov and Hutter 2016) without restarts, the schedule of GPT (Radford et al. 2018, section 4.1).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if step >= config.max_steps:
        return config.min_learning_rate
    part = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * (1 + math.cos(math.pi * part)) / 2
