"""The loss of a language model: how surprised it is by each next token. It knows the model's two halves, nothing of data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.model import GPT2

# In 16 bits, matrices whose sides are multiples of this are multiplied faster: the loss over 50,257 tokens takes a twentieth
# less on a CPU with matrix units, and GPUs are said to care more. For fewer tokens than the second it is not worth it.
_MULTIPLE, _MIN_PADDED = 64, 4096

# Rows of logits that are held at once, and for small vocabularies how many logits.
_ROWS, _LOGITS = 1024, 2**22


class LanguageModelLoss(nn.Module):
    """The mean cross-entropy, in nats, of `targets` (B, T) after `input_ids` (B, T), both int64.

    A module of its own, so that what wraps a module's forward (DDP, FSDP, torch.compile) wraps the loss too.
    """

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model.hidden_states(input_ids)  # (B, T, C)
        return sum_of_losses(hidden.flatten(0, 1), self.model.wte.weight, targets.flatten()) / targets.numel()


def sum_of_losses(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross-entropies, in nats, of `targets` (N,) int64 by the logits of `rows` (N, C) and `head` (V, C).

    Products are in autocast's dtype where that is on; probabilities, sums and gradients are in float32 or `rows`' dtype.
    """
    device, dtype = rows.device.type, rows.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (rows, head)]
    total: Tensor = _SumOfLosses.apply(rows, head, targets, dtype, *wanted)
    return total


class _SumOfLosses(torch.autograd.Function):
    """Head and loss in one, by parts: the logits of a whole batch may need more memory than the model.

    The gradients are made along with the loss, while the logits of a part are there; to keep them for later, or to compute
    them once more, is what takes a third of the time on a CPU with matrix units otherwise.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype, of_rows: bool, of_head: bool
    ) -> Tensor:
        exact, vocab_size = torch.promote_types(dtype, torch.float32), len(head)
        n_rows = _ROWS if dtype == torch.float16 else max(_ROWS, _LOGITS // vocab_size)
        # Of so many rows a sum may be too large for float16, whatever a GradScaler does to what comes from above.
        ctx.shrunk = 1 / 32 if dtype == torch.float16 else 1.0
        weight = _padded(head, dtype)
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
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In place, for they are needed once: a second time, autograd sees that they have changed.
        d_rows, d_head = ctx.saved_tensors
        d_rows = None if d_rows is None else d_rows.mul_(d_total)
        d_head = None if d_head is None else d_head.mul_(d_total / ctx.shrunk)
        return d_rows, d_head, None, None, None, None


def _padded(head: Tensor, dtype: torch.dtype) -> Tensor:
    """`head` in `dtype`, with rows of zeros behind it where products are faster with them."""
    padding = -len(head) % _MULTIPLE
    if not padding or dtype.itemsize > 2 or len(head) < _MIN_PADDED:
        return head.to(dtype)
    weight = head.new_zeros(len(head) + padding, head.shape[1], dtype=dtype)
    weight[: len(head)] = head
    return weight
