"""The loss of a language model: how surprised it is by each next token. It knows the model's two halves, nothing of data."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions

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
        # Head and loss in one, by parts: the logits of a batch may need more memory than the whole model. Those of a
        # few characters do not, and are sooner done at once.
        by_parts = LinearCrossEntropyOptions(batch_chunk_size=_ROWS) if head.shape[0] > head.shape[1] else None
        return F.linear_cross_entropy(hidden.flatten(0, 1), head, targets.flatten(), options=by_parts)
