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
        along: PromptPart | None = None,
    ) -> Tensor:
        """Return the logits (B, V) after the windows of B decoders, as `Decoder.next_logits` of each would.

        `caches` are the results of `Decoder.next_in_slot`. The pass computes `along` too. Raises CheckpointError if the
        model computes NaN.
        """
        texts, lengths = [decoder.windows[0].ids[-1:] for decoder in decoders], [cache.length for cache in caches]
        slots, own_cache = list(slots), list[Tensor]()
        if along is not None:
            self.plan.check_fit(along.cache, 1, len(along.ids))
            texts, lengths, slots = [*texts, list(along.ids)], [*lengths, along.cache.length], [*slots, -1]
            own_cache = along.cache.layers
        n_tokens = sum(map(len, texts))
        with decoders[0].timed("slots", n_tokens if along is None else -n_tokens.bit_length(), work=n_tokens):
            hidden = self.plan.hidden_states_of_slots(texts, lengths, slots, self.layers, own_cache)
            logits = decoders[0].logits(hidden[: len(decoders)])
        check_finite(logits)
        if along is not None:
            along.cache.advance(len(along.ids))
        for decoder, cache in zip(decoders, caches, strict=True):
            decoder.count_step(cache)
        return logits
