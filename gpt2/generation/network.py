"""Networks of the decoder for a model that a user has changed, and for prompts that are embeddings.

The decoder computes hidden states, and then logits of the rows that it needs. If a user has hooked or replaced `forward`, or
made a subclass with another `forward`, only `model(x)` gives the user's logits. It depends on `gpt2.fast.unchanged`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gpt2.fast.unchanged import is_called_as_written
from gpt2.kv_cache import KVCache
from gpt2.model import GPT2
from gpt2.positions import positions_of, visible_slots


class CalledModel:
    """Provides `hidden_states` and `logits` for a model that must be called as a whole.

    `hidden_states` returns the logits, and `logits` returns its argument.
    """

    def __init__(self, model: GPT2) -> None:
        self._model = model

    def hidden_states(self, input_ids: Tensor, *, attention_mask: Tensor | None, kv_cache: KVCache | None) -> Tensor:
        """Return the logits (B, T, V)."""
        logits: Tensor = self._model(input_ids, attention_mask=attention_mask, kv_cache=kv_cache)
        return logits

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return `hidden_states`, which are logits (..., V)."""
        return hidden_states


class EmbeddingNetwork:
    """Computes prompts in which some ids are placeholders: negative numbers that stand for embeddings.

    A placeholder has its vector in `vectors` where a token has its row of `wte`; the position embedding is added to both.
    """

    def __init__(self, model: GPT2, vectors: Mapping[int, Tensor]) -> None:
        self._model, self._vectors = model, vectors

    def hidden_states(self, input_ids: Tensor, *, attention_mask: Tensor | None, kv_cache: KVCache | None) -> Tensor:
        """Return the hidden states (B, T, C) of `input_ids` (B, T)."""
        model, T, past = self._model, input_ids.shape[1], 0 if kv_cache is None else kv_cache.length
        positions = positions_of(past, T, attention_mask, input_ids.device)
        x = model.wte(input_ids.clamp(min=0))  # (B, T, C)
        is_placeholder = input_ids < 0
        if bool(is_placeholder.any()):
            x[is_placeholder] = torch.stack([self._vectors[token] for token in input_ids[is_placeholder].tolist()]).to(x)
        x = model.stream(x + model.wpe(positions), visible_slots(past, T, attention_mask, input_ids.device), kv_cache)
        if kv_cache is not None:
            kv_cache.advance(T)
        return x

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of hidden states, (..., C) to (..., V)."""
        return self._model.logits(hidden_states)


def network_of(model: GPT2) -> GPT2 | CalledModel:
    """Return the model itself if a call runs `hidden_states`, `logits` and nothing else; otherwise a `CalledModel` of it."""
    return model if is_called_as_written(model) else CalledModel(model)
