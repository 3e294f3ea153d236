"""KVCache: the keys and values of the tokens so far, in memory that is set aside once. It knows nothing of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_config.errors import InputError
from gpt_config.model_config import GPT2Config


class KVCache:
    """Room for `max_length` tokens of each of `batch_size` rows, in every layer.

    Pass the same cache to each forward call: it attends to what the cache holds and appends its own tokens. `length` is
    the number of slots in use, padding included. Keys and values take 2 * n_layer * n_embd * max_length numbers a row.
    """

    def __init__(
        self,
        config: GPT2Config,
        *,
        batch_size: int = 1,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.max_length = config.n_positions if max_length is None else max_length
        self.length = 0
        shape = (2, batch_size, config.n_head, self.max_length, config.head_dim)  # keys, then values
        self._layers = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]

    def reserve(self, batch_size: int, n_tokens: int) -> None:
        """Take `n_tokens` more slots in each row. InputError if there is no room for them, or the rows are not as many."""
        rows = self._layers[0].shape[1]
        if batch_size != rows:
            raise InputError(f"input_ids has {batch_size} rows and the cache {rows}: use one cache for each batch")
        if self.length + n_tokens > self.max_length:
            raise InputError(
                f"the cache holds {self.length} of at most {self.max_length} tokens and has no room for {n_tokens} more: "
                "make it longer, or start a new one with the end of the text, as generate() does"
            )
        self.length += n_tokens

    def append(self, layer: int, keys_and_values: Tensor) -> Tensor:
        """Store (2, B, n_head, T, head_dim) in the last T reserved slots; return the same for all slots in use."""
        stored = self._layers[layer][:, :, :, : self.length]
        stored[:, :, :, -keys_and_values.shape[3] :] = keys_and_values
        return stored

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in that order; a row may be named several times (as beams are) or not at all."""
        self._layers = [layer.index_select(1, rows) for layer in self._layers]
