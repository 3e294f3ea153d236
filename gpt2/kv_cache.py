"""KVCache: the keys and values of the tokens so far, in memory that is allocated once.

It depends on the model's config, not on the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gpt_config.errors import InputError
from gpt_config.model_config import GPT2Config


class KVStore(Protocol):
    """The interface that attention needs to store keys and values: a `KVCache`, or an object that replaces one."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values, each (B, n_head, T, head_dim), of T new tokens.

        Returns the keys and values that these tokens may attend to, each (B, n_head, S, head_dim).
        """


class KVCache:
    """Memory for the keys and values of up to `max_length` tokens in each of `batch_size` rows, in every layer.

    Pass the same cache to each forward call. The call attends to the cached tokens and appends its own. `length` is the
    number of slots in use, including padding. `layers` has one tensor (2, B, n_head, max_length, head_dim) for each layer:
    keys, then values. The cache holds 2 * n_layer * n_embd * max_length numbers per row. `max_length` None is
    `config.n_positions`.
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

    @classmethod
    def in_memory(cls, layers: Sequence[Tensor]) -> KVCache:
        """Return an empty cache in memory that exists: one tensor (2, B, n_head, max_length, head_dim) for each layer."""
        cache = cls.__new__(cls)
        cache.max_length, cache.length, cache.layers = layers[0].shape[3], 0, list(layers)
        return cache

    def check_fit(
        self, config: GPT2Config, rows: int, n_tokens: int, weight: Tensor, *, dtype: torch.dtype | None = None
    ) -> None:
        """Raise InputError unless `n_tokens` more tokens of `rows` rows fit.

        The cache must have the layers and heads of `config`, and the dtype, or `dtype`, and the device of `weight`.
        """
        store = self.layers[0]
        n_layer, n_head, head_dim = len(self.layers), store.shape[2], store.shape[4]
        if (n_layer, n_head, head_dim) != (config.n_layer, config.n_head, config.head_dim):
            raise InputError(
                f"the cache is for {n_layer} layers of {n_head} heads of size {head_dim}, and this model has "
                f"{config.n_layer} layers of {config.n_head} heads of size {config.head_dim}: make a cache with its config"
            )
        if rows != store.shape[1]:
            raise InputError(f"input_ids has {rows} rows and the cache has {store.shape[1]}: use one cache for each batch")
        if store.dtype not in (weight.dtype, dtype) or store.device != weight.device:
            raise InputError(
                f"the cache is {store.dtype} on {store.device} and the model computes in {weight.dtype} on {weight.device}: "
                "make the cache with the model's dtype and device"
            )
        if self.length + n_tokens > self.max_length:
            raise InputError(
                f"the cache holds {self.length} of at most {self.max_length} tokens and has no room for {n_tokens} more: "
                "make a longer cache, or start a new one with the end of the text, as generate() does"
            )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values, each (B, n_head, T, head_dim), in the T slots after those in use.

        Returns the keys and values of all S = length + T tokens, each (B, n_head, S, head_dim), as views of the cache. The
        new slots count as in use only after `advance`, so a forward call that raises leaves the cache unchanged.
        """
        end = self.length + keys.shape[2]
        stored = self.layers[layer][:, :, :, :end]  # (2, B, n_head, S, head_dim)
        stored[0, :, :, self.length :] = keys
        stored[1, :, :, self.length :] = values
        return stored[0], stored[1]

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` more slots as in use, after all layers have stored them."""
        self.length += n_tokens

    def truncate(self, length: int) -> None:
        """Keep the first `length` slots; the next tokens overwrite the rest. Raises InputError if fewer are in use."""
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens and cannot be cut to {length}: keep 0 to {self.length}")
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Keep the rows with these indices (int64), in that order. An index may be repeated, as in beam search."""
        self.layers = [layer.index_select(1, rows) for layer in self.layers]

    def __deepcopy__(self, memo: object) -> KVCache:
        """Return an independent cache with the same contents."""
        other = copy.copy(self)
        other.layers = [layer.detach().clone() for layer in self.layers]
        return other
