"""Muon for the matrices of the blocks, and AdamW for all other parameters. Depends on parameters, not on the model or data.

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon);
Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982), for the size of an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn

# The polynomial a x + b x^3 + c x^5, whose slope at 0 is steep: five times in a row, it brings each singular value from
# 0.01 to 1 near 1, between 0.68 and 1.14. The result is not exactly orthogonal, and need not be (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_N_STEPS = 5
_SMALL = 1e-7  # added to the norm, so that a gradient of zeros stays zero
# The root mean square of an update of AdamW is 0.2 to 0.4. With this factor, Muon's is 0.2, so both optimizers can have the
# same learning rate and weight decay (Liu et al. 2025, section 2.2).
_SIZE = 0.2
_N_JOINED = 3  # c_attn is three matrices side by side: of queries, keys and values


def newton_schulz(matrix: Tensor, n_steps: int = _N_STEPS) -> Tensor:
    """Return `matrix` (..., n, m) with singular values near 1, in the same dtype: U f(S) V^T in place of U S V^T.

    f is the polynomial of `COEFFICIENTS`, `n_steps` times, of the singular values divided by the norm of the matrix. Only
    matrix products are needed.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if is_tall else matrix  # the products are between the shorter sides
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + _SMALL)
    for _ in range(n_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter of a model with this name is a matrix of a block. Embeddings, biases and norms are not."""
    return parameter.dim() == 2 and any(part == "h" for part in name.split("."))


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, by name, and AdamW for `groups`, as one optimizer.

    For a gradient G and the momentum B = momentum B + G of a matrix W (n, m): W = (1 - lr weight_decay) W - lr 0.2
    sqrt(max(n, m)) newton_schulz(G + momentum B). The queries, keys and values of a `c_attn` are three matrices. With FSDP,
    each process gathers the whole update of a matrix, and keeps its own part of the result.
    """

    def __init__(
        self,
        matrices: dict[str, nn.Parameter],
        groups: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        betas: tuple[float, float],
        fused: bool,
    ) -> None:
        self._adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
        common = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        joined = [parameter for name, parameter in matrices.items() if "c_attn" in name]
        single = [parameter for name, parameter in matrices.items() if "c_attn" not in name]
        own = [
            {"params": parameters, "n_matrices": n, **common}
            for parameters, n in ((joined, _N_JOINED), (single, 1))
            if parameters
        ]
        super().__init__([*own, *self._adamw.param_groups], {"lr": lr, "n_matrices": 0})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step. `closure` must be None: the gradients are there already."""
        assert closure is None
        others = []
        for group in self.param_groups:
            if not group["n_matrices"]:
                others.append(group)
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        # Both are replaced when a state is loaded.
        self._adamw.param_groups, self._adamw.state = others, self.state
        self._adamw.step()
        return None

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"]
        momentum.mul_(group["momentum"]).add_(gradient)
        update = _orthogonal(gradient.add(momentum, alpha=group["momentum"]), group["n_matrices"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def _orthogonal(update: Tensor, n_matrices: int) -> Tensor:
    """Return the update of a parameter (n, n_matrices * m), as a tensor of the same kind, whole or sharded."""
    from torch.distributed.tensor import DTensor, Replicate

    if isinstance(update, DTensor):
        whole = _orthogonal(update.full_tensor(), n_matrices)
        everywhere = DTensor.from_local(whole, update.device_mesh, [Replicate()] * update.device_mesh.ndim, run_check=False)
        return everywhere.redistribute(placements=update.placements)
    n, width = update.shape
    matrices = update.view(n, n_matrices, width // n_matrices).transpose(0, 1)  # (n_matrices, n, m)
    # 16 bits are enough on a GPU, and twice as fast (Jordan et al. 2024).
    dtype = torch.bfloat16 if update.device.type == "cuda" else update.dtype
    size = _SIZE * math.sqrt(max(matrices.shape[-2:]))
    return (newton_schulz(matrices.to(dtype)).to(update.dtype) * size).transpose(0, 1).reshape(n, width)
