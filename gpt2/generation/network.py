"""CalledModel: lets the decoder run a model that a user has changed. It depends on `gpt2.fast.unchanged`.

The decoder computes hidden states, and then logits of the rows that it needs. If a user has hooked or replaced `forward`, or
made a subclass with another `forward`, only `model(x)` gives the user's logits.
"""

from __future__ import annotations

from torch import Tensor

from gpt2.fast.unchanged import is_called_as_written
from gpt2.kv_cache import KVCache
from gpt2.model import GPT2


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


def network_of(model: GPT2) -> GPT2 | CalledModel:
    """Return the model itself if a call runs `hidden_states`, `logits` and nothing else; otherwise a `CalledModel` of it."""
    return model if is_called_as_written(model) else CalledModel(model)
