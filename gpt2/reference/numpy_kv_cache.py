"""Keys and values of the tokens so far, in an array that is allocated once. It knows nothing of attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpt_config.model_config import GPT2Config

Array = np.ndarray[Any, np.dtype[Any]]


class KVCache:
    """Keys and values of up to n_positions tokens per layer: (layers, 2, B, H, n_positions, D), keys first, then values.

    `length` is the number of tokens in the cache. The model increases it after the last layer, because all layers write
    their keys and values at the same place.
    """

    def __init__(self, config: GPT2Config, batch_size: int = 1, dtype: Any = np.float32) -> None:
        self.length = 0
        shape = (config.n_layer, 2, batch_size, config.n_head, config.n_positions, config.head_dim)
        self._rows = np.empty(shape, dtype)

    def append(self, layer: int, keys: Array, values: Array) -> tuple[Array, Array]:
        """Add new keys and values (B, H, T, D) of `layer`. Returns those of all S tokens, as views (B, H, S, D)."""
        end = self.length + keys.shape[2]
        rows = self._rows[layer, :, :, :, :end]  # (2, B, H, S, D)
        rows[0, :, :, self.length :] = keys
        rows[1, :, :, self.length :] = values
        return rows[0], rows[1]
