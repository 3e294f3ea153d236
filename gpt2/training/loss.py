"""The loss of a language model: how surprised it is by each next token. It knows the model's two halves, nothing of data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.utils.checkpoint import checkpoint

from gpt2.model import GPT2

# Rows of logits that are held at once. Parts of this size measured no slower than all at once, for 4,096 and 50,257 tokens.
_ROWS = 1024


class LanguageModelLoss(nn.Module):
    """The mean cross-entropy, in nats, of `targets` (B, T) after `input_ids` (B, T), both int64.

    A module of its own, so that what wraps a module's forward (DDP, FSDP, torch.compile) wraps the loss too.
    """

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model.hidden_states(input_ids)  # (B, T, C)
        head = self.model.wte.weight
        rows, ids = hidden.flatten(0, 1), targets.flatten()
        # Head and loss in one, by parts: the logits of a batch may need more memory than the whole model. Those of a
        # few characters do not, and are sooner done at once.
        if head.shape[0] <= head.shape[1]:
            return F.linear_cross_entropy(rows, head, ids)
        if rows.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return _loss_by_parts(rows, head, ids)
        return F.linear_cross_entropy(rows, head, ids, options=LinearCrossEntropyOptions(batch_chunk_size=_ROWS))


def _loss_by_parts(rows: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """The same under autocast on a CPU, where torch's own parts would be multiplied in float32: with matrix units that takes
    three times as long. Where there are several parts, their logits are computed once more for the gradients."""
    parts = list(zip(rows.split(_ROWS), ids.split(_ROWS), strict=True))
    if len(parts) == 1:
        return F.cross_entropy(F.linear(rows, head), ids)
    sums = [checkpoint(_sum_of_losses, part, head, part_ids, use_reentrant=False) for part, part_ids in parts]
    return torch.stack(sums).sum() / len(ids)


def _sum_of_losses(rows: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    # Cast here, for autocast casts weights once for all parts, and the parts' gradients would be added up in that dtype.
    dtype = torch.get_autocast_dtype("cpu")
    return F.cross_entropy(F.linear(rows.to(dtype), head.to(dtype)), ids, reduction="sum")
