"""GPT2Classifier: a GPT-2 with a linear head that labels a text. Depends on the model, not on files or training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.model import GPT2
from gpt_config.errors import ConfigError, InputError
from gpt_config.finetuning_config import PROBLEM_TYPES


class GPT2Classifier(nn.Module):
    """A GPT-2 with a linear head on the hidden state of the last token, like transformers' `GPT2ForSequenceClassification`.

    `labels` are the names of the classes, in the order of the head's outputs. `context` is the largest number of tokens of a
    text in training; the default is the number of positions of the model.

    `problem_type` says what an output means: see `scores`. `pad_token_id` is the id that transformers takes for padding at
    the end of a text: see `last_positions`. ConfigError for an unknown `problem_type`.
    """

    def __init__(
        self,
        transformer: GPT2,
        labels: Sequence[str],
        context: int | None = None,
        *,
        problem_type: str | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        super().__init__()
        if problem_type not in (None, *PROBLEM_TYPES):
            raise ConfigError(
                f"problem_type={problem_type!r} must be one of {', '.join(PROBLEM_TYPES)}", field="problem_type"
            )
        self.transformer, self.labels = transformer, tuple(labels)
        self.context = transformer.config.n_positions if context is None else context
        self.problem_type, self.pad_token_id = problem_type, pad_token_id
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

    def scores(self, logits: Tensor) -> Tensor:
        """Return float32 scores (B, labels) of `logits` (B, labels), as transformers' pipeline for text classification does.

        The logits themselves for "regression"; the probability of each label alone (sigmoid) for
        "multi_label_classification" or a single label; otherwise probabilities with the sum 1 (softmax).
        """
        logits = logits.float()
        if self.problem_type == "regression":
            return logits
        if self.problem_type == "multi_label_classification" or len(self.labels) == 1:
            return logits.sigmoid()
        return logits.softmax(-1)

    def last_positions(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Return the position of the last token of each row that is not `pad_token_id`; 0 if there is none.

        transformers takes these ids for padding wherever they are at the end of a text, so its classifiers were trained so.
        """
        return [max((place for place, token in enumerate(ids) if token != self.pad_token_id), default=0) for ids in rows]

    def to_config(self) -> dict[str, Any]:
        """Return the fields of a `config.json` that transformers' classifier has and its language model has not."""
        return {
            "architectures": ["GPT2ForSequenceClassification"],
            "id2label": {str(number): label for number, label in enumerate(self.labels)},
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "problem_type": self._stored_problem_type(),
        }

    def _stored_problem_type(self) -> str | None:
        # transformers refuses to read a single label with "single_label_classification".
        if self.problem_type in (None, PROBLEM_TYPES[0]):
            return PROBLEM_TYPES[0] if len(self.labels) > 1 else None
        return self.problem_type
