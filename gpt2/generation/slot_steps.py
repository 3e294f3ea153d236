"""SlotSteps: steps of several texts in slots, with one pass over the weights for all of them.

Each text has a `Decoder` whose cache is a slot, and attends to its own tokens only. A step may compute a part of a prompt
too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.fast.plan import DecodePlan
from gpt2.generation.decoder import Decoder
from gpt2.generation.sampling import check_finite
from gpt2.kv_cache import KVCache


@dataclass(frozen=True)
class PromptPart:
    """The next tokens of a prompt, and the cache of one row that has the tokens before them."""

    ids: Sequence[int]
    cache: KVCache


@dataclass(frozen=True)
class SlotSteps:
    """The plan of all decoders, and the memory of all slots: for each layer (2, n_slots, n_head, n_positions, head_dim)."""

    plan: DecodePlan
    layers: list[Tensor]

    @torch.inference_mode()
    def first_logits(self, decoders: Sequence[Decoder], slots: Sequence[int]) -> Tensor:
        """Return the logits (B, V) after the windows of B new decoders, as `Decoder.next_logits` of each would.

        Each `can_begin_with_others`, and makes its cache in its slot. Raises CheckpointError if the model computes NaN.
        """
        begun = [decoder.begin_in_slot() for decoder in decoders]
        texts, lengths = [ids[cache.length :] for ids, cache in begun], [cache.length for _, cache in begun]
        n_tokens = sum(map(len, texts))
        with decoders[0].timed("prefill", n_tokens.bit_length(), work=n_tokens):
            logits = self.plan.logits(self.plan.hidden_states_of_slots(texts, lengths, slots, self.layers))
        check_finite(logits)
        for decoder, (ids, cache) in zip(decoders, begun, strict=True):
            decoder.count_first_step(ids, cache)
        return logits

    @torch.inference_mode()
    def next_logits(
        self,
        decoders: Sequence[Decoder],
        caches: Sequence[KVCache],
        slots: Sequence[int],
        *,
        new: tuple[Decoder, int] | None = None,
        along: PromptPart | None = None,
    ) -> Tensor:
        """Return the logits (B, V) after the windows of B decoders, as `Decoder.next_logits` of each would.

        `caches` are the results of `Decoder.next_in_slot`. With `new`, a decoder that begins and its slot, the result is
        (B + 1, V). The pass computes `along` too. Raises CheckpointError if the model computes NaN.
        """
        texts: list[Sequence[int]] = [decoder.windows[0].ids[-1:] for decoder in decoders]
        lengths, slots, own_cache = [cache.length for cache in caches], list(slots), list[Tensor]()
        begun = None if new is None else new[0].begin_in_slot()
        if new is not None and begun is not None:
            ids, cache = begun
            texts, lengths, slots = [*texts, ids[cache.length :]], [*lengths, cache.length], [*slots, new[1]]
        n_rows = len(texts)
        if along is not None:
            self.plan.check_fit(along.cache, 1, len(along.ids))
            texts, lengths, slots = [*texts, along.ids], [*lengths, along.cache.length], [*slots, -1]
            own_cache = along.cache.layers
        n_tokens = sum(map(len, texts))
        is_step = new is None and along is None
        with decoders[0].timed("slots", n_tokens if is_step else -n_tokens.bit_length(), work=n_tokens):
            hidden = self.plan.hidden_states_of_slots(texts, lengths, slots, self.layers, own_cache)
            logits = decoders[0].logits(hidden[:n_rows])
        check_finite(logits)
        if along is not None:
            along.cache.advance(len(along.ids))
        for decoder, cache in zip(decoders, caches, strict=True):
            decoder.count_step(cache)
        if new is not None and begun is not None:
            new[0].count_first_step(*begun)
        return logits
