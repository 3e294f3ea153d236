"""The loss of a language model: the mean cross-entropy of the next token. Depends on the model, not on data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt2.model import GPT2

# Products of 16-bit matrices are faster if their sides are multiples of this. The loss over a vocabulary of 50,257 tokens
# takes 5% less time on a CPU with matrix units.
_MULTIPLE = 64


@dataclass(frozen=True)
class LossLimits:
    """The sizes of the parts in which the loss is computed. They change its value only by rounding."""

    rows: int = 1024  # rows of logits per part
    logits: int = 2**22  # logits per part, where this gives more rows (small vocabularies, not in float16)
    min_padded: int = 4096  # from this vocabulary size on, a 16-bit head is padded to a multiple of 64 outputs


class _Plan(NamedTuple):
    """How one loss is computed."""

    dtype: torch.dtype  # of the matrix products
    of_rows: bool  # whether the gradient of the hidden states is needed
    of_head: bool  # whether the gradient of the head is needed
    n_rows: int  # rows of logits per part
    n_outputs: int  # outputs of the head, padding included


class LanguageModelLoss(nn.Module):
    """The mean cross-entropy, in nats, of `targets` (B, T) given `input_ids` (B, T), both int64.

    It is a module, so that wrappers of a module's forward (DDP, FSDP, torch.compile) include the loss.
    """

    def __init__(self, model: GPT2, limits: LossLimits | None = None) -> None:
        super().__init__()
        self.model, self._limits = model, limits or LossLimits()

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model.hidden_states(input_ids)  # (B, T, C)
        rows = hidden.flatten(0, 1)  # (B * T, C)
        return sum_of_losses(rows, self.model.wte.weight, targets.flatten(), self._limits) / targets.numel()


def sum_of_losses(rows: Tensor, head: Tensor, targets: Tensor, limits: LossLimits | None = None) -> Tensor:
    """Return the sum of the cross-entropies, in nats, of `targets` (N,) int64, given the hidden states `rows` (N, C) and the
    output matrix `head` (V, C).

    Matrix products are in autocast's dtype if autocast is on. Probabilities, sums and gradients are in float32 or in the
    dtype of `rows`.
    """
    device, dtype = rows.device.type, rows.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    of_rows, of_head = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (rows, head)]
    plan = _plan(len(head), dtype, of_rows, of_head, limits or LossLimits())
    apply: Any = _SumOfLosses.apply  # it has no types in torch
    total: Tensor = apply(rows, head, targets, plan)
    return total


def _plan(vocab_size: int, dtype: torch.dtype, of_rows: bool, of_head: bool, limits: LossLimits) -> _Plan:
    n_rows = limits.rows if dtype == torch.float16 else max(limits.rows, limits.logits // vocab_size)
    is_padded = dtype.itemsize <= 2 and vocab_size >= limits.min_padded
    return _Plan(dtype, of_rows, of_head, n_rows, vocab_size + -vocab_size % _MULTIPLE if is_padded else vocab_size)


class _SumOfLosses(torch.autograd.Function):
    """Head and cross-entropy, computed in parts, because the logits of a whole batch may need more memory than the model.

    The gradients are computed in the forward pass, while the logits of a part are in memory. To keep the logits for the
    backward pass, or to compute them again, would take a third of the time on a CPU with matrix units.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: Tensor, targets: Tensor, plan: _Plan) -> Tensor:
        dtype, of_rows, of_head, n_rows, n_outputs = plan
        exact, vocab_size = torch.promote_types(dtype, torch.float32), len(head)
        # A sum over this many rows may overflow float16. A GradScaler cannot prevent that: its factor enters in `backward`,
        # after the sum.
        ctx.shrunk = 1 / 32 if dtype == torch.float16 else 1.0
        weight = _padded(head, dtype, n_outputs)
        total = torch.zeros((), dtype=exact, device=rows.device)
        d_rows, d_head = torch.empty_like(rows) if of_rows else None, None
        # These buffers are used for all parts: to allocate memory of this size takes longer than the computation in it.
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
            # The gradient of the loss with respect to the logits: the probabilities, minus 1 at the target. `backward`
            # multiplies it by the incoming gradient, because float16 would underflow here.
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
        # In place, because they are needed once. A second backward pass is an error: autograd sees that they have changed.
        d_rows, d_head = ctx.saved_tensors
        d_rows = None if d_rows is None else d_rows.mul_(d_total)
        d_head = None if d_head is None else d_head.mul_(d_total / ctx.shrunk)
        return d_rows, d_head, None, None


def _padded(head: Tensor, dtype: torch.dtype, n_outputs: int) -> Tensor:
    """Return `head` (V, C) in `dtype`, padded with rows of zeros to (n_outputs, C)."""
    if n_outputs == len(head):
        return head.to(dtype)
    weight = head.new_zeros(n_outputs, head.shape[1], dtype=dtype)
    weight[: len(head)] = head
    return weight
