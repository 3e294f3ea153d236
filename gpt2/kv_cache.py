"""KVCache: the keys and values of the tokens so far, in memory that is set aside once. It knows nothing of the model."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor

from gpt_config.errors import InputError
from gpt_config.model_config import GPT2Config


class KVStore(Protocol):
    """Where a layer keeps keys and values: a `KVCache`, or what stands in for one."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep (B, n_head, T, head_dim) each; return those that the T tokens may look at, (B, n_head, S, head_dim) each."""


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

    def check_fit(self, config: GPT2Config, rows: int, n_tokens: int, weight: Tensor) -> None:
        """InputError unless `n_tokens` of `rows` rows fit, of a model with this config that computes as `weight` is."""
        store = self.layers[0]
        n_layer, n_head, head_dim = len(self.layers), store.shape[2], store.shape[4]
        if (n_layer, n_head, head_dim) != (config.n_layer, config.n_head, config.head_dim):
            raise InputError(
                f"the cache is for {n_layer} layers of {n_head} heads of size {head_dim}, and this model has "
                f"{config.n_layer} layers of {config.n_head} heads of size {config.head_dim}: make one with its config"
            )
        if rows != store.shape[1]:
            raise InputError(f"input_ids has {rows} rows and the cache {store.shape[1]}: use one cache for each batch")
        if (weight.dtype, weight.device) != (store.dtype, store.device):
            raise InputError(
                f"the cache is {store.dtype} on {store.device} and the model computes {weight.dtype} on {weight.device}: "
                "make it with the model's dtype and device"
            )
        if self.length + n_tokens > self.max_length:
            raise InputError(
                f"the cache holds {self.length} of at most {self.max_length} tokens and has no room for {n_tokens} more: "
                "make it longer, or start a new one with the end of the text, as generate() does"
            )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, n_head, T, head_dim) each in the T slots after those in use; return the same for all S = length + T.

        They count as in use after `advance`, so a call that an exception ends leaves the cache as it was.
        """
        end = self.length + keys.shape[2]
        stored = self.layers[layer][:, :, :, :end]  # (2, B, n_head, S, head_dim)
        stored[0, :, :, self.length :] = keys
        stored[1, :, :, self.length :] = values
        return stored[0], stored[1]

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` more slots as in use: all layers have stored them."""
        self.length += n_tokens

    def truncate(self, length: int) -> None:
        """Keep the first `length` slots and forget the rest, which the next tokens overwrite."""
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens and cannot be cut to {length}: keep 0 to {self.length}")
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in that order; a row may be named several times (as beams are) or not at all."""
        self.layers = [layer.index_select(1, rows) for layer in self.layers]

    def __deepcopy__(self, memo: object) -> KVCache:
        """A cache that goes on by itself from here."""
        other = copy.copy(self)
        other.layers = [layer.detach().clone() for layer in self.layers]
        return other
