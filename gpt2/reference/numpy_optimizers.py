"""Optimizers in NumPy, written from their formulas. They know parameters and gradients by name, and no model.

Each `x_step` function updates one parameter and its state in place. The classes keep the states of all parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt_config.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]
State = dict[str, Any]


def sgd_step(
    parameter: Array, gradient: Array, state: State, *, learning_rate: float, momentum: float = 0.0, nesterov: bool = False
) -> None:
    """velocity = momentum velocity + g; parameter -= lr velocity, or with Nesterov lr (g + momentum velocity).

    g is the gradient, lr the learning rate. Sutskever et al. 2013, section 2, in the form of torch.optim.SGD: the velocity
    is not scaled by lr. Nesterov's step looks ahead: it adds the momentum term of the next step to the gradient.
    """
    if momentum == 0:
        parameter -= learning_rate * gradient
        return
    if "velocity" not in state:
        state["velocity"] = np.zeros_like(parameter)
    velocity = state["velocity"]
    velocity *= momentum
    velocity += gradient
    parameter -= learning_rate * (gradient + momentum * velocity if nesterov else velocity)


def adam_step(
    parameter: Array,
    gradient: Array,
    state: State,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> None:
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; parameter -= lr m' / (sqrt(v') + epsilon).

    m and v are running means of the gradient g and of its square. They start at 0, so after t steps they are too small by
    the factors 1 - b1^t and 1 - b2^t. Divided by these factors, they are m' and v'. Kingma and Ba 2015, algorithm 1.
    """
    if not state:
        state |= {"steps": 0, "mean": np.zeros_like(parameter), "square": np.zeros_like(parameter)}
    state["steps"] += 1
    mean, square, (beta_1, beta_2) = state["mean"], state["square"], betas
    mean *= beta_1
    mean += (1 - beta_1) * gradient
    square *= beta_2
    square += (1 - beta_2) * gradient * gradient
    denominator = np.sqrt(square)
    denominator /= math.sqrt(1 - beta_2 ** state["steps"])
    denominator += epsilon
    step = mean / denominator
    step *= learning_rate / (1 - beta_1 ** state["steps"])
    parameter -= step


def adamw_step(
    parameter: Array,
    gradient: Array,
    state: State,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    """parameter -= lr weight_decay parameter, then `adam_step`. Loshchilov and Hutter 2019, algorithm 2.

    In Adam with an L2 penalty, the decay is part of the gradient and is divided by sqrt(v') too. Here it is separate.
    """
    parameter *= 1 - learning_rate * weight_decay
    adam_step(parameter, gradient, state, learning_rate=learning_rate, betas=betas, epsilon=epsilon)


@dataclass
class SGD:
    """Stochastic gradient descent with momentum, by `sgd_step`."""

    parameters: dict[str, Array]
    momentum: float = 0.9
    nesterov: bool = True
    states: dict[str, State] = field(default_factory=dict)

    def step(self, gradients: dict[str, Array], learning_rate: float) -> None:
        """Update all parameters in place."""
        for name, parameter in self.parameters.items():
            sgd_step(
                parameter,
                gradients[name],
                self.states.setdefault(name, {}),
                learning_rate=learning_rate,
                momentum=self.momentum,
                nesterov=self.nesterov,
            )


@dataclass
class Adam:
    """Adam without weight decay, by `adam_step`."""

    parameters: dict[str, Array]
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    states: dict[str, State] = field(default_factory=dict)

    def step(self, gradients: dict[str, Array], learning_rate: float) -> None:
        """Update all parameters in place."""
        for name, parameter in self.parameters.items():
            state = self.states.setdefault(name, {})
            adam_step(parameter, gradients[name], state, learning_rate=learning_rate, betas=self.betas, epsilon=self.epsilon)


@dataclass
class AdamW:
    """Adam with decoupled weight decay, by `adamw_step`.

    Only matrices decay: biases and the weights of norms gain nothing from being small.
    """

    parameters: dict[str, Array]
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    states: dict[str, State] = field(default_factory=dict)

    def step(self, gradients: dict[str, Array], learning_rate: float) -> None:
        """Update all parameters in place."""
        for name, parameter in self.parameters.items():
            adamw_step(
                parameter,
                gradients[name],
                self.states.setdefault(name, {}),
                learning_rate=learning_rate,
                betas=self.betas,
                epsilon=self.epsilon,
                weight_decay=self.weight_decay if parameter.ndim >= 2 else 0.0,
            )


def clip_gradients(gradients: dict[str, Array], max_norm: float) -> float:
    """Scale all gradients in place so that their common norm is at most `max_norm`. Returns the norm before scaling.

    norm = sqrt(sum of the squares of all numbers in all gradients). Pascanu et al. 2013, algorithm 1. The 1e-6 prevents
    division by zero, as in PyTorch.
    """
    norm = math.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients.values()))
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for gradient in gradients.values():
            gradient *= scale
    return norm


def warmup_cosine(step: int, *, learning_rate: float, min_learning_rate: float, warmup_steps: int, max_steps: int) -> float:
    """The learning rate of `step`, counted from 0: a linear rise, half a cosine down, then `min_learning_rate`.

    lr (step + 1) / (warmup_steps + 1) before `warmup_steps`; then min + (lr - min) (1 + cos(pi done)) / 2, where done grows
    from 0 at `warmup_steps` to 1 at `max_steps`. Loshchilov and Hutter 2017, equation 5, without restarts. InputError unless
    0 <= warmup_steps <= max_steps.
    """
    if not 0 <= warmup_steps <= max_steps:
        raise InputError(f"warmup_steps={warmup_steps} must be between 0 and max_steps={max_steps}: choose another number")
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    if step >= max_steps:
        return min_learning_rate
    done = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_learning_rate + (learning_rate - min_learning_rate) * (1 + math.cos(math.pi * done)) / 2
