"""CalledModel: a changed model as the decoder calls it. It knows that a model can be called, not how it was changed.

The decoder asks a model for hidden states and, of the rows that it needs, for logits. Where a user has replaced what
`model(x)` does, hooked it or made a subclass with a `forward` of its own, only the call itself gives the user's logits.
"""

from __future__ import annotations

from torch import Tensor

from gpt2.fast.unchanged import is_called_as_written
from gpt2.kv_cache import KVCache
from gpt2.model import GPT2


class CalledModel:
    """`hidden_states` and `logits` of a model that has to be called as a whole: the former are the logits already."""

    def __init__(self, model: GPT2) -> None:
        self._model = model

    def hidden_states(self, input_ids: Tensor, *, attention_mask: Tensor | None, kv_cache: KVCache | None) -> Tensor:
        """Logits (B, T, V)."""
        logits: Tensor = self._model(input_ids, attention_mask=attention_mask, kv_cache=kv_cache)
        return logits

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The same (..., V)."""
        return hidden_states


def network_of(model: GPT2) -> GPT2 | CalledModel:
    """The model itself, where its `hidden_states` and `logits` are all that a call runs."""
    return model if is_called_as_written(model) else CalledModel(model)
