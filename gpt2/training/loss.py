"""The loss of a language model: how surprised it is by each next token. It knows the model's two halves, nothing of data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt2.model import GPT2

# In 16 bits, products of matrices whose sides are multiples of this are faster: the loss over 50,257 tokens takes 5% less
# time on a CPU with matrix units.
_MULTIPLE = 64


@dataclass(frozen=True)
class LossLimits:
    """How the loss is computed in parts. The values change it by rounding only."""

    rows: int = 1024  # of logits that are held at once
    logits: int = 2**22  # held at once where that is more: small vocabularies
    min_padded: int = 4096  # outputs of a head in 16 bits that repay padding it to a multiple of 64


class _Plan(NamedTuple):
    """What is computed, how: the dtype of products, which gradients, rows of logits at once, outputs with padding."""

    dtype: torch.dtype
    of_rows: bool
    of_head: bool
    n_rows: int
    n_outputs: int


class LanguageModelLoss(nn.Module):
    """The mean cross-entropy, in nats, of `targets` (B, T) after `input_ids` (B, T), both int64.

    A module of its own, so that what wraps a module's forward (DDP, FSDP, torch.compile) wraps the loss too.
    """

    def __init__(self, model: GPT2, limits: LossLimits | None = None) -> None:
        super().__init__()
        self.model, self._limits = model, limits or LossLimits()

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model.hidden_states(input_ids)  # (B, T, C)
        rows = hidden.flatten(0, 1)  # (B * T, C)
        return sum_of_losses(rows, self.model.wte.weight, targets.flatten(), self._limits) / targets.numel()


def sum_of_losses(rows: Tensor, head: Tensor, targets: Tensor, limits: LossLimits | None = None) -> Tensor:
    """The sum of the cross-entropies, in nats, of `targets` (N,) int64 by the logits of `rows` (N, C) and `head` (V, C).

    Products are in autocast's dtype where that is on; probabilities, sums and gradients are in float32 or `rows`' dtype.
    """
    device, dtype = rows.device.type, rows.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    of_rows, of_head = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (rows, head)]
    plan = _plan(len(head), dtype, of_rows, of_head, limits or LossLimits())
    apply: Any = _SumOfLosses.apply  # torch gives it no types
    total: Tensor = apply(rows, head, targets, plan)
    return total


def _plan(vocab_size: int, dtype: torch.dtype, of_rows: bool, of_head: bool, limits: LossLimits) -> _Plan:
    n_rows = limits.rows if dtype == torch.float16 else max(limits.rows, limits.logits // vocab_size)
    is_padded = dtype.itemsize <= 2 and vocab_size >= limits.min_padded
    return _Plan(dtype, of_rows, of_head, n_rows, vocab_size + -vocab_size % _MULTIPLE if is_padded else vocab_size)


class _SumOfLosses(torch.autograd.Function):
    """Head and loss together, in parts: the logits of a whole batch may need more memory than the model.

    The gradients are computed with the loss, while the logits of a part are in memory. To keep the logits for later, or to
    compute them again, would take a third of the time on a CPU with matrix units.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: Tensor, targets: Tensor, plan: _Plan) -> Tensor:
        dtype, of_rows, of_head, n_rows, n_outputs = plan
        exact, vocab_size = torch.promote_types(dtype, torch.float32), len(head)
        # Of so many rows a sum may be too large for float16, whatever a GradScaler does to what comes from above.
        ctx.shrunk = 1 / 32 if dtype == torch.float16 else 1.0
        weight = _padded(head, dtype, n_outputs)
        total = torch.zeros((), dtype=exact, device=rows.device)
        d_rows, d_head = torch.empty_like(rows) if of_rows else None, None
        # Used again for each part: fresh memory of this size is slower than what is computed in it.
        shape = min(n_rows, len(rows)), len(weight)
        all_logits = torch.empty(shape, dtype=dtype, device=rows.device)
        all_log_probs = all_logits if exact == dtype else torch.empty(shape, dtype=exact, device=rows.device)
        for start in range(0, len(rows), n_rows):
            part = rows[start : start + n_rows].to(dtype)
            right = targets[start : start + n_rows, None]
            logits, log_probs = all_logits[: len(part)], all_log_probs[: len(part)]
            torch.mm(part, weight.t(), out=logits)
            logits[:, vocab_size:] = -math.inf
            torch.log_softmax(log_probs.copy_(logits), -1, out=log_probs)
            log_probs_right = log_probs[:, :vocab_size].gather(1, right)
            total -= log_probs_right.sum()
            if not (of_rows or of_head):
                continue
            # Of the loss by the logits: the probabilities, less 1 for the right one. Not yet times what comes from above, in
            # which float16 would underflow.
            d_logits = logits.copy_(log_probs.exp_().scatter_(1, right, log_probs_right.exp_() - 1))
            if d_rows is not None:
                d_rows[start : start + n_rows] = d_logits @ weight
            if of_head:
                if ctx.shrunk != 1:
                    part = part * ctx.shrunk
                if d_head is None:
                    d_head = (d_logits.t() @ part).to(exact)
                elif dtype == exact:
                    d_head.addmm_(d_logits.t(), part)
                else:
                    d_head += d_logits.t() @ part
        ctx.save_for_backward(d_rows, None if d_head is None else d_head[:vocab_size])
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because they are needed once: autograd refuses a second use, since they have changed.
        d_rows, d_head = ctx.saved_tensors
        d_rows = None if d_rows is None else d_rows.mul_(d_total)
        d_head = None if d_head is None else d_head.mul_(d_total / ctx.shrunk)
        return d_rows, d_head, None, None


def _padded(head: Tensor, dtype: torch.dtype, n_outputs: int) -> Tensor:
    """`head` (V, C) in `dtype`, with rows of zeros up to `n_outputs`."""
    if n_outputs == len(head):
        return head.to(dtype)
    weight = head.new_zeros(n_outputs, head.shape[1], dtype=dtype)
    weight[: len(head)] = head
    return weight
