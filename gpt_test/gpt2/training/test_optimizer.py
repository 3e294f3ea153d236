"""The schedules of the learning rate equal those of PyTorch and transformers, at each step, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from gpt2.training.optimizer import learning_rate
from gpt_config import TrainingConfig


def rates_of(schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], rate: float, n: int) -> list:
    """The learning rates of `n` steps of one of PyTorch's schedulers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler, rates = schedule(optimizer), []
    for _ in range(n):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(config: TrainingConfig) -> list[float]:
    return [learning_rate(config, step) for step in range(config.max_steps)]


def test_the_linear_schedule_is_pytorchs() -> None:
    config = TrainingConfig(max_steps=50, warmup_steps=7, learning_rate=0.3, min_learning_rate_share=0.2, schedule="linear")
    theirs = rates_of(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=43), 0.3, 44)
    assert ours(config)[7:] == pytest.approx(theirs[:-1], rel=1e-12)
    assert learning_rate(config, 50) == config.lowest_rate == pytest.approx(theirs[-1], rel=1e-12)
    assert ours(config)[:7] == pytest.approx([0.3 * step / 8 for step in range(1, 8)], rel=1e-12)


@pytest.mark.parametrize(("shape", "theirs"), [("sqrt", "1-sqrt"), ("linear", "linear"), ("cosine", "cosine")])
def test_warm_up_stable_decay_is_that_of_transformers(shape: str, theirs: str) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    config = TrainingConfig(
        max_steps=60, warmup_steps=5, decay_steps=20, decay_shape=shape, learning_rate=0.3, min_learning_rate_share=0.05,
        schedule="wsd",
    )  # fmt: skip

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return optimization.get_wsd_schedule(
            optimizer, num_warmup_steps=0, num_decay_steps=20, num_stable_steps=35, decay_type=theirs, min_lr_ratio=0.05
        )

    assert ours(config)[5:] == pytest.approx(rates_of(schedule, 0.3, 55), rel=1e-12)
    assert learning_rate(config, 60) == pytest.approx(0.015, rel=1e-12)


def test_the_default_decay_is_the_last_fifth_of_the_run() -> None:
    config = TrainingConfig(max_steps=100, warmup_steps=10, learning_rate=1.0, schedule="wsd")
    rates = ours(config)
    assert rates[10:80] == [1.0] * 70 and all(one > two for one, two in pairwise(rates[80:]))
    assert rates[99] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(19 / 20)), rel=1e-12) and config.n_decay == 20
    short = TrainingConfig(max_steps=100, warmup_steps=95, schedule="wsd")
    assert short.n_decay == 5, "the warm-up leaves no more"
    assert ours(TrainingConfig(max_steps=9, warmup_steps=0, decay_steps=0, learning_rate=0.7, schedule="wsd")) == [0.7] * 9


def test_a_constant_rate_stays_after_the_warm_up() -> None:
    config = TrainingConfig(max_steps=30, warmup_steps=3, learning_rate=0.4, schedule="constant")
    assert ours(config) == pytest.approx([0.1, 0.2, 0.3] + [0.4] * 27, rel=1e-12)
    assert learning_rate(config, 30) == config.lowest_rate == 0.4
