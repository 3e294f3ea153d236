"""GPT2Classifier: a GPT-2 with a linear head that labels a text. Depends on the model, not on files or training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpt2.model import GPT2
from gpt_config.errors import InputError


class GPT2Classifier(nn.Module):
    """A GPT-2 with a linear head on the hidden state of the last token, like transformers' `GPT2ForSequenceClassification`.

    `labels` are the names of the classes, in the order of the head's outputs. `context` is the largest number of tokens of a
    text in training; the default is the number of positions of the model.
    """

    def __init__(self, transformer: GPT2, labels: Sequence[str], context: int | None = None) -> None:
        super().__init__()
        self.transformer, self.labels = transformer, tuple(labels)
        self.context = transformer.config.n_positions if context is None else context
        self.score = nn.Linear(transformer.config.n_embd, len(labels), bias=False)
        nn.init.normal_(self.score.weight, std=transformer.config.initializer_range)
        self.score.to(transformer.wte.weight)  # the device and dtype of the model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits (B, labels) of `input_ids` (B, T) int64.

        `attention_mask` (B, T) is 1 for tokens and 0 for padding, which may be on either side. InputError if a row has no
        token.
        """
        hidden = self.transformer.hidden_states(input_ids, attention_mask=attention_mask)  # (B, T, C)
        if attention_mask is None:
            return self.logits(hidden, torch.full((len(hidden),), hidden.shape[1] - 1, device=hidden.device))
        if not bool(attention_mask.any(-1).all()):
            raise InputError("a row of attention_mask has no token to classify: remove the row")
        places = torch.arange(hidden.shape[1], device=hidden.device)
        return self.logits(hidden, (places * attention_mask.bool()).argmax(-1))  # the last token

    def logits(self, hidden: Tensor, last: Tensor) -> Tensor:
        """Return logits (B, labels) from the hidden states `hidden` (B, T, C) at the positions `last` (B,)."""
        logits: Tensor = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        return logits
