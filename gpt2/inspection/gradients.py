"""Attribution of a metric to the tokens of the input, by gradients with respect to their embeddings.

It depends on interventions and on metrics of `effects`. B: rows, T: tokens, C = n_embd.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2.inspection.effects import Metric
from gpt2.inspection.intervention import intervene
from gpt2.inspection.tracing import trace
from gpt2.model import GPT2
from gpt2.quantization.quantize import is_int8
from gpt_config.errors import InputError
from gpt_config.validation import check_whole


class TokenAttribution(NamedTuple):
    """`scores` (B, T) of the tokens. `total` (B,) is the metric minus that of the baseline.

    `error` is how far the sum of the scores of a row is from `total`.
    """

    scores: Tensor
    total: Tensor

    @property
    def error(self) -> Tensor:
        """The completeness error of each row: (B,)."""
        return (self.scores.sum(-1) - self.total).abs()


def gradient_times_input(
    model: GPT2, ids: Tensor, metric: Metric, *, attention_mask: Tensor | None = None
) -> TokenAttribution:
    """Return the gradient of the metric with respect to each token's embedding, times the embedding, summed over C.

    It is the first-order effect of setting the embedding to zero; `total` is the real effect of setting all to zero. The
    metric must give one number for each row: (B,).
    """
    embedded = trace(model, ids, "hook_embed", attention_mask=attention_mask)["hook_embed"]
    zeros = torch.zeros_like(embedded)
    gradient, value = _gradient(model, ids, embedded, metric, attention_mask)
    return TokenAttribution((gradient * embedded).sum(-1), value - _gradient(model, ids, zeros, metric, attention_mask)[1])


def integrated_gradients(
    model: GPT2,
    ids: Tensor,
    metric: Metric,
    *,
    baseline: Tensor | int | None = None,
    steps: int = 50,
    attention_mask: Tensor | None = None,
) -> TokenAttribution:
    """Return integrated gradients from a baseline to the embeddings: scores whose sum is nearly the metric's difference.

    `baseline` is a token id, a tensor that broadcasts to the embeddings (B, T, C), or None for zeros. The integral is a sum
    over `steps` points (Gauss-Legendre); more steps make `error` smaller. The metric must give one number per row: (B,).
    Sundararajan et al. 2017, "Axiomatic attribution for deep networks".
    """
    check_whole("steps", steps, 1)
    embedded = trace(model, ids, "hook_embed", attention_mask=attention_mask)["hook_embed"]
    if isinstance(baseline, int):
        baseline = trace(model, torch.full_like(ids, baseline), "hook_embed")["hook_embed"]
    start = torch.zeros_like(embedded) if baseline is None else baseline.to(embedded).expand(embedded.shape)
    points, weights = np.polynomial.legendre.leggauss(steps)
    mean = torch.zeros_like(embedded)
    for point, weight in zip(points.tolist(), weights.tolist(), strict=True):
        at = start + (point + 1) / 2 * (embedded - start)
        mean += weight / 2 * _gradient(model, ids, at, metric, attention_mask)[0]
    ends = [_gradient(model, ids, end, metric, attention_mask)[1] for end in (embedded, start)]
    return TokenAttribution((mean * (embedded - start)).sum(-1), ends[0] - ends[1])


def _gradient(
    model: GPT2, ids: Tensor, embedded: Tensor, metric: Metric, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of the metric at these embeddings, (B, T, C), and the metric, (B,)."""
    if is_int8(model):
        raise InputError("int8 weights have no gradients: load the model with dtype=float32")
    embedded = embedded.detach().requires_grad_()
    with intervene(model, {"hook_embed": embedded}), torch.enable_grad():
        value = metric(model(ids, attention_mask=attention_mask))
        if value.shape not in ((len(ids),), *([()] if len(ids) == 1 else [])):
            raise InputError(
                f"the metric has shape {tuple(value.shape)}: it must give one number for each row, ({len(ids)},)"
            )
        (gradient,) = torch.autograd.grad(value.sum(), embedded)
    return gradient, value.detach().reshape(len(ids))
