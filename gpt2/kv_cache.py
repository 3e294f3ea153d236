"""KVCache: the keys and values of the tokens so far, in memory that is set aside once. It knows nothing of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_config.errors import InputError
from gpt_config.model_config import GPT2Config


class KVCache:
    """Room for `max_length` tokens of each of `batch_size` rows, in every layer.

    Pass the same cache to each forward call: it attends to what the cache holds and appends its own tokens. `length` is
    the number of slots in use, padding included. `layers` holds a tensor (2, B, n_head, max_length, head_dim) of keys and
    values for each layer. Keys and values take 2 * n_layer * n_embd * max_length numbers a row.
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
        shape = (2, batch_size, config.n_head, self.max_length, config.head_dim)
        self.layers = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]

    def reserve(self, rows: int, n_tokens: int, x: Tensor) -> None:
        """Take `n_tokens` slots of each row, for what is computed as `x` is.

        InputError if they do not fit: rows, length, dtype or device.
        """
        store = self.layers[0]
        if rows != store.shape[1]:
            raise InputError(f"input_ids has {rows} rows and the cache {store.shape[1]}: use one cache for each batch")
        if (x.dtype, x.device) != (store.dtype, store.device):
            raise InputError(
                f"the cache is {store.dtype} on {store.device} and the model computes {x.dtype} on {x.device}: "
                "make it with the model's dtype and device"
            )
        if self.length + n_tokens > self.max_length:
            raise InputError(
                f"the cache holds {self.length} of at most {self.max_length} tokens and has no room for {n_tokens} more: "
                "make it longer, or start a new one with the end of the text, as generate() does"
            )
        self.length += n_tokens

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, n_head, T, head_dim) each in the last T reserved slots; return the same for all slots in use."""
        stored = self.layers[layer][:, :, :, : self.length]
        n_tokens = keys.shape[2]
        stored[0, :, :, -n_tokens:] = keys
        stored[1, :, :, -n_tokens:] = values
        return stored[0], stored[1]

    def truncate(self, length: int) -> None:
        """Keep the first `length` slots and forget those behind them, which the next tokens will take."""
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens and cannot be cut to {length}: keep 0 to {self.length}")
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in that order; a row may be named several times (as beams are) or not at all."""
        self.layers = [layer.index_select(1, rows) for layer in self.layers]
