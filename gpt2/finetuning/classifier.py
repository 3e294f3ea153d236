"""GPT2Classifier: a GPT-2 with a linear head that gives a text a label. It knows neither files nor training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpt2.model import GPT2
from gpt_config.errors import InputError


class GPT2Classifier(nn.Module):
    """A GPT-2 and a linear head on the state of the last token, as `GPT2ForSequenceClassification` of transformers has it.

    `labels` are the names of the classes, in the order of the head's outputs. `context` is how many tokens of a text it was
    trained on, by default all positions of the model.
    """

    def __init__(self, transformer: GPT2, labels: Sequence[str], context: int | None = None) -> None:
        super().__init__()
        self.transformer, self.labels = transformer, tuple(labels)
        self.context = transformer.config.n_positions if context is None else context
        self.score = nn.Linear(transformer.config.n_embd, len(labels), bias=False)
        nn.init.normal_(self.score.weight, std=transformer.config.initializer_range)
        self.score.to(transformer.wte.weight)  # its device and dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, labels) of `input_ids` (B, T). `attention_mask` (B, T) is 1 for a token and 0 for padding, on either
        side. InputError for a row without a token."""
        hidden = self.transformer.hidden_states(input_ids, attention_mask=attention_mask)  # (B, T, C)
        if attention_mask is None:
            return self.logits(hidden, torch.full((len(hidden),), hidden.shape[1] - 1, device=hidden.device))
        if not bool(attention_mask.any(-1).all()):
            raise InputError("a row of attention_mask has no token: there is nothing to classify")
        places = torch.arange(hidden.shape[1], device=hidden.device)
        return self.logits(hidden, (places * attention_mask.bool()).argmax(-1))  # the last token

    def logits(self, hidden: Tensor, last: Tensor) -> Tensor:
        """Logits (B, labels) from the states `hidden` (B, T, C) at the places `last` (B,)."""
        logits: Tensor = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        return logits
