"""Each optimizer, gradient clipping and the learning-rate schedule against PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2.reference import numpy_optimizers as optimizers
from gpt_config import InputError

SHAPES = {"matrix": (3, 5), "vector": (4,)}
STEPS = 12


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def assert_same_path(ours, parameters: dict[str, np.ndarray], theirs, tensors: dict[str, torch.Tensor]) -> None:
    """The parameters are equal after each of several steps with changing gradients and learning rates."""
    for step in range(STEPS):
        gradients, rate = arrays(100 + step), 0.1 / (step + 1)
        kept = {name: gradient.copy() for name, gradient in gradients.items()}
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        ours.step(gradients, rate)
        for name, tensor in tensors.items():
            np.testing.assert_allclose(parameters[name], tensor.detach().numpy(), rtol=0, atol=1e-13)
            assert (gradients[name] == kept[name]).all()


def started(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    parameters = arrays(seed)
    return parameters, {name: torch.tensor(value, requires_grad=True) for name, value in parameters.items()}


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True), (0.5, True)])
def test_sgd(momentum: float, nesterov: bool) -> None:
    parameters, tensors = started()
    theirs = torch.optim.SGD(tensors.values(), lr=1.0, momentum=momentum, nesterov=nesterov)
    assert_same_path(optimizers.SGD(parameters, momentum, nesterov), parameters, theirs, tensors)


@pytest.mark.parametrize(("betas", "epsilon"), [((0.9, 0.999), 1e-8), ((0.8, 0.95), 1e-2)])
def test_adam(betas: tuple[float, float], epsilon: float) -> None:
    parameters, tensors = started()
    theirs = torch.optim.Adam(tensors.values(), lr=1.0, betas=betas, eps=epsilon)
    assert_same_path(optimizers.Adam(parameters, betas, epsilon), parameters, theirs, tensors)


def test_adamw_decays_matrices_only() -> None:
    parameters, tensors = started()
    groups = [
        {"params": [tensors["matrix"]], "weight_decay": 0.3},
        {"params": [tensors["vector"]], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), eps=1e-4)
    ours = optimizers.AdamW(parameters, betas=(0.8, 0.95), epsilon=1e-4, weight_decay=0.3)
    assert_same_path(ours, parameters, theirs, tensors)


def test_steps_stay_in_float32() -> None:
    for kind in (optimizers.SGD, optimizers.Adam, optimizers.AdamW):
        parameters = {name: value.astype(np.float32) for name, value in arrays(0).items()}
        optimizer = kind(parameters)
        optimizer.step({name: value.astype(np.float32) for name, value in arrays(1).items()}, 0.1)
        values = [value for state in optimizer.states.values() for value in state.values() if isinstance(value, np.ndarray)]
        assert values and all(value.dtype == np.float32 for value in [*parameters.values(), *values])


@given(st.floats(1e-3, 100), st.integers(0, 99))
def test_clipping(max_norm: float, seed: int) -> None:
    gradients = arrays(seed)
    tensors = {name: torch.zeros(value.shape, dtype=torch.float64, requires_grad=True) for name, value in gradients.items()}
    for name, tensor in tensors.items():
        tensor.grad = torch.tensor(gradients[name])
    theirs = torch.nn.utils.clip_grad_norm_(tensors.values(), max_norm)
    assert math.isclose(optimizers.clip_gradients(gradients, max_norm), theirs.item(), rel_tol=1e-12)
    for name, tensor in tensors.items():
        np.testing.assert_allclose(gradients[name], tensor.grad.numpy(), rtol=1e-12, atol=0)


@given(st.integers(0, 20), st.integers(1, 60), st.floats(1e-4, 1), st.floats(0, 1))
def test_schedule(warmup: int, decay: int, rate: float, share: float) -> None:
    """The cosine equals PyTorch's at each step; the warm-up equals its formula; after `max_steps` the rate is constant."""
    options = {
        "learning_rate": rate, "min_learning_rate": share * rate, "warmup_steps": warmup, "max_steps": warmup + decay,
    }  # fmt: skip
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=decay, eta_min=share * rate)
    for step in range(warmup + decay + 1):
        ours = optimizers.warmup_cosine(step, **options)
        if step < warmup:
            assert math.isclose(ours, rate * (step + 1) / (warmup + 1))
            continue
        assert math.isclose(ours, optimizer.param_groups[0]["lr"], rel_tol=1e-9, abs_tol=1e-12)
        optimizer.step()
        cosine.step()
    assert optimizers.warmup_cosine(warmup + decay + 7, **options) == share * rate


def test_a_warmup_longer_than_max_steps_is_refused() -> None:
    with pytest.raises(InputError, match=r"warmup_steps=5.*max_steps=4"):
        optimizers.warmup_cosine(0, learning_rate=1, min_learning_rate=0, warmup_steps=5, max_steps=4)
