"""Decoder: the logits of the next token of growing sequences. It prefills them, then decodes one token at a time.

It depends on the model, the cache and `gpt2.fast`. It does not sample; the only tokens it chooses itself are greedy ones.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.dropout import in_mode
from gpt2.fast import threads
from gpt2.fast.cuda_graph import GraphedSteps
from gpt2.fast.greedy_head import GreedyHead
from gpt2.fast.limits import FAST, FastLimits
from gpt2.fast.plan import DecodePlan, PlanOfEach, cache_dtype, is_coarse
from gpt2.fast.unchanged import keeps_layers_apart
from gpt2.generation.network import CalledModel, EmbeddingNetwork, network_of
from gpt2.generation.prefix_cache import Prefix, PrefixCache
from gpt2.generation.sampling import check_finite, is_finite
from gpt2.generation.window import Window
from gpt2.kv_cache import KVCache
from gpt2.model import GPT2
from gpt2.quantization.derived import state_of
from gpt2.quantization.quantize import is_int8

# Whatever computes hidden states (B, T, C) of ids (B, T). A plan may return those of the last token only, (B, 1, C).
Network = DecodePlan | PlanOfEach | CalledModel | EmbeddingNetwork | GPT2


@dataclass(frozen=True)
class GreedyRun:
    """Greedy tokens that were computed in one call.

    `failed` is True if a step raised an error, as the int8 kernel does at NaN. The cache is then unchanged, and the caller
    continues one token at a time, because the text may end before that step.
    """

    tokens: list[int]
    failed: bool = False


class Decoder:
    """Computes next-token logits for a batch of windows of any lengths. Append a token to each window between two calls.

    With `use_cache=False` every call recomputes all windows; tests compare the cached path with this one. With
    `only_largest`, a logit may be -inf if it cannot be the largest of the first `vocab_size` logits of its row. `vectors`
    maps each negative id in the windows to its embedding (C,): see `network`. `make_cache` returns an empty cache of some
    number of tokens for the only window; None: the decoder makes its caches. Decoders may share a `plan` of the model.

    Beginnings of windows are copied from `prefixes`, in float32 and float64 and if the model was not changed. In fewer bits,
    a window that is computed in two parts is rounded differently, which could change its tokens. `beginning`, of the only
    window, is copied in every dtype: the caller has computed it in parts.
    """

    def __init__(
        self,
        model: GPT2,
        windows: list[Window],
        max_new_tokens: int,
        *,
        use_cache: bool = True,
        only_largest: bool = False,
        vocab_size: int | None = None,
        prefixes: PrefixCache | None = None,
        fast: FastLimits = FAST,
        vectors: Mapping[int, Tensor] | None = None,
        make_cache: Callable[[int], KVCache] | None = None,
        plan: DecodePlan | None = None,
        beginning: Prefix | None = None,
    ) -> None:
        self.windows = windows
        self._make_cache, self._beginning = make_cache, beginning
        self.only_largest = only_largest
        self._model = model
        self._tokens_left = max_new_tokens
        self._vocab_size = vocab_size
        self._fast = fast
        has_plan = use_cache and fast.use_plan and DecodePlan.fits(model)
        limits = fast.for_tokens(max_new_tokens)
        self._plan = (plan or DecodePlan(model, only_last=True, limits=limits)) if has_plan else None
        self._network: Network = self._plan or network_of(model)
        self._vectors = dict(vectors or {})
        self._use_cache = has_plan or (use_cache and keeps_layers_apart(model))
        has_greedy_head = only_largest and has_plan and max_new_tokens >= fast.greedy_head.min_steps
        has_greedy_head = has_greedy_head and GreedyHead.fits(model.wte, fast.greedy_head)
        self._greedy_head = GreedyHead(model.wte, vocab_size, fast.greedy_head) if has_greedy_head else None
        is_graphed = has_plan and GraphedSteps.fits(model, fast.graphs)
        self._graphed = GraphedSteps(model, vocab_size, fast.graphs) if is_graphed else None
        self._n_at_once = 1
        self._is_exact = model.dtype in (torch.float32, torch.float64) and not is_int8(model)
        self._prefixes = prefixes if has_plan and self._is_exact else None
        if self._prefixes is not None:
            self._prefixes.use_for(state_of(*model.parameters()))
        self._device = model.device
        self._cache: KVCache | None = None
        self._mask: Tensor | None = None  # (B, cache.max_length) int64; None if no row is padded

    @property
    def room(self) -> int:
        """How many drafts fit in the cache in addition to the next token; 0 before the first prefill."""
        return 0 if self._cache is None else max(0, self._cache.max_length - self._cache.length - 1)

    @property
    def verifier(self) -> Network | None:
        """The network that verifies drafts without changing the tokens; None if its rounding could change them."""
        if self._plan:
            return self._plan.for_drafts
        return None if is_int8(self._model) or is_coarse(self._model.wpe.weight) else self._network

    @torch.inference_mode()
    def next_logits(self, drafts: Sequence[int] = ()) -> Tensor:
        """Return the logits (B, V) of the token after each window, in the model's dtype. The next call may overwrite them.

        With `drafts`, at most `room` tokens that may follow the only window, it returns logits (1 + len(drafts), V): after
        the window and after each draft. If the drafts make the model compute NaN, it returns (1, V). Append the accepted
        drafts to the window, and `reject` the others.

        Raises CheckpointError if the model computes NaN.
        """
        if self._model.training:  # dropout would change greedy ids if the caller forgot eval()
            with in_mode(self._model, is_training=False):
                return self.next_logits(drafts)
        tokens_left = self._tokens_left
        try:
            return self._next_logits(drafts)
        except BaseException:  # the cache may be incomplete
            self.forget()
            self._tokens_left = tokens_left
            raise

    def forget(self) -> None:
        """Drop the cache. The next call recomputes all windows."""
        self._cache = self._mask = None
        self._forget_graph()

    def _next_logits(self, drafts: Sequence[int]) -> Tensor:
        slid = [window.slide() for window in self.windows]
        cache = self._cache
        if cache is None or any(slid) or cache.length == cache.max_length:
            logits = self._prefill()
        else:
            logits = self._verify(drafts, cache) if drafts else self._decode_one_token(cache)
        self._tokens_left -= 1 + len(drafts)
        if drafts and not is_finite(logits):  # a draft that would be rejected may cause the NaN: compute without drafts
            self.reject(1 + len(drafts))
            self._forget_graph()  # slots that the graph masks may contain NaN
            return self._next_logits(())
        check_finite(logits)
        return logits

    def reserve_greedy_steps(self) -> int:
        """Return how many tokens to request from `greedy_tokens`, which must be called next.

        The greedy head counts these tokens as computed. 0 means that `next_logits` must be called instead: for several
        windows, padding, a full cache, or without `only_largest`.
        """
        cache = self._cache
        if self._plan is None or cache is None or self._mask is not None or len(self.windows) > 1 or not self.only_largest:
            return 0
        n, graphed = min(self._n_at_once, cache.max_length - cache.length), self._graphed
        if graphed and (room := graphed.room(cache)):
            n = min(n, room)
        elif graphed and graphed.is_to_come(cache.max_length - cache.length - 1, self._tokens_left):
            return 0
        return self._greedy_head.leave_alone(n) if self._greedy_head else n

    @torch.inference_mode()
    def greedy_tokens(self, n: int, ends: Collection[int]) -> GreedyRun:
        """Decode `n` greedy tokens of the only window, where `n` is the result of `reserve_greedy_steps`.

        Returns fewer tokens if one of `ends` or NaN comes before. The caller appends them to the window.
        """
        cache, plan, graphed = self._cache, self._plan, self._graphed
        assert cache is not None and plan is not None
        length, start, last = cache.length, self._fast.clock(), self.windows[0].ids[-1]
        try:
            if graphed and graphed.room(cache):
                steps = graphed.greedy_tokens(last, n, cache)
            else:
                with self.timed("greedy", work=n):
                    steps = plan.greedy_tokens(last, n, self._vocab_size, cache)
        except RuntimeError:  # the int8 kernel raises at NaN, perhaps in a step after the end of the text
            return GreedyRun([], failed=True)
        seconds = max(self._fast.clock() - start, 1e-6)
        self._n_at_once = int(min(self._fast.max_at_once, 1 + self._fast.seconds_at_once * n / seconds))
        tokens = [token for token, _ in itertools.takewhile(lambda step: math.isfinite(step[1]), steps)]
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        tokens = tokens[: end + 1]
        cache.truncate(length + len(tokens))
        self._tokens_left -= len(tokens)
        return GreedyRun(tokens, failed=not tokens)

    def reject(self, n_tokens: int) -> None:
        """Remove the last `n_tokens` computed tokens from the cache, because they were not appended to the window."""
        if n_tokens and self._cache is not None:
            self._cache.truncate(self._cache.length - n_tokens)
            self._tokens_left += n_tokens

    def select(self, rows: list[int]) -> None:
        """Keep the windows with these indices, in this order. An index may be repeated, as in beam search."""
        self.windows = [self.windows[row] for row in rows]
        self._select_computed(torch.tensor(rows, device=self._device))

    @torch.inference_mode()
    def copy_prefill(self, other: Decoder) -> None:
        """Instead of the first `next_logits`, copy keys and values of a decoder that has computed the same visible ids."""
        self.windows[0].slide()
        self._tokens_left -= 1
        if other._cache is None:
            return
        n_tokens = other._cache.length
        cache = self._new_cache(1, min(self._model.config.n_positions, n_tokens + max(self._tokens_left, 0)))
        assert cache is not None
        for target, source in zip(cache.layers, other._cache.layers, strict=True):
            target[:, :, :, :n_tokens] = source[:, :, :, :n_tokens]
        cache.advance(n_tokens)
        self._cache = cache

    def next_in_slot(self) -> KVCache | None:
        """Return the cache of the only window if the next step is its last token alone; None if it needs `next_logits`.

        A window slides only when its cache is full. Without a plan, as after a hook was added, each window runs alone.
        """
        cache = self._cache
        return None if self._plan is None or cache is None or cache.length == cache.max_length else cache

    def count_step(self, cache: KVCache) -> None:
        """Count a step that was computed for several windows. `cache` is the result of `next_in_slot`."""
        cache.advance(1)
        self._tokens_left -= 1

    @property
    def can_begin_with_others(self) -> bool:
        """Whether a prefill together with others gives the same tokens. In few bits rounding could change them."""
        return self._plan is not None and self._is_exact and not self._vectors

    def begin_in_slot(self) -> tuple[tuple[int, ...], KVCache]:
        """Return the visible ids of the only window, and a new cache that has what is known of them.

        The caller computes the rest in the cache, and calls `count_first_step`.
        """
        self.windows[0].slide()
        ids = tuple(self.windows[0].visible_ids)
        cache = self._new_cache(1, self._n_slots(len(ids)))
        assert cache is not None
        self._copy_beginnings([ids], cache)
        return ids, cache

    def count_first_step(self, ids: tuple[int, ...], cache: KVCache) -> None:
        """Count a prefill that the caller has computed. The arguments are the results of `begin_in_slot`."""
        cache.advance(len(ids) - cache.length)
        self._cache = cache
        self._tokens_left -= 1
        if self._prefixes is not None:
            self._prefixes.note([ids], cache)

    @torch.inference_mode()
    def join(self, windows: list[Window], max_new_tokens: int, vectors: Mapping[int, Tensor] | None = None) -> Tensor:
        """Prefill more windows and append them to the batch.

        Returns the logits (B, V) of the token after each of the B new windows. Each may get `max_new_tokens` tokens.
        """
        self._vectors |= vectors or {}
        new = copy.copy(self)
        new.windows, new._cache, new._mask, new._graphed = windows, None, None, None
        new._tokens_left = max_new_tokens
        logits = new.next_logits()
        self._tokens_left = max(self._tokens_left, new._tokens_left)
        self.windows = [*self.windows, *windows]
        if self._cache is not None and new._cache is not None:
            self._merge([(self._cache, self._mask), (new._cache, new._mask)])
        else:
            self._cache = self._mask = None
        self._forget_graph()
        return logits

    def _merge(self, parts: list[tuple[KVCache, Tensor | None]]) -> None:
        """Merge caches into one. The last tokens of all rows are in the same slot; shorter rows are padded on the left.

        Slots that no row uses are left out. Rows that have left had longer texts, so without this the cache would grow.
        """
        used = [(cache, mask, slice(_n_unused(cache, mask), cache.length)) for cache, mask in parts]
        length = max(slots.stop - slots.start for _, _, slots in used)
        n_slots = min(self._model.config.n_positions, length + self._tokens_left)
        merged = self._new_cache(len(self.windows), n_slots)
        assert merged is not None
        mask = torch.ones(len(self.windows), n_slots, dtype=torch.int64, device=self._device)
        first = 0
        for cache, part_mask, slots in used:
            n_rows, pad = cache.layers[0].shape[1], length - (slots.stop - slots.start)
            rows = slice(first, first + n_rows)
            for target, source in zip(merged.layers, cache.layers, strict=True):
                target[:, rows, :, :pad] = 0  # padding is masked, but NaN times a weight of 0 would be NaN
                target[:, rows, :, pad:length] = source[:, :, :, slots]
            mask[rows, :pad] = 0
            if part_mask is not None:
                mask[rows, pad:length] = part_mask[:, slots]
            first += n_rows
        merged.advance(length)
        self._cache, self._mask = merged, None if bool(mask.all()) else mask

    def _select_computed(self, rows: Tensor) -> None:
        if self._cache is not None:
            self._cache.select(rows)
        if self._mask is not None:
            self._mask = self._mask.index_select(0, rows)
        self._forget_graph()

    def _forget_graph(self) -> None:
        if self._graphed:
            self._graphed.forget()

    def _prefill(self) -> Tensor:
        """Compute all windows in a new cache, padded on the left. Windows with equal visible ids are computed once."""
        prompts = [tuple(window.visible_ids) for window in self.windows]
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        self._forget_graph()
        self._cache, self._mask, logits = self._compute(list(distinct), self._n_slots(max(map(len, distinct))))
        if self._prefixes is not None and self._cache is not None:
            self._prefixes.note(list(distinct), self._cache)
        if len(distinct) == len(prompts):
            return logits
        rows = torch.tensor([distinct[prompt] for prompt in prompts], device=self._device)
        self._select_computed(rows)
        return logits.index_select(0, rows)

    def _n_slots(self, n_tokens: int) -> int:
        """Return how many slots are needed for a prompt of `n_tokens` and for the new tokens.

        Padding takes slots too, so the cache of a batch may be full before its longest window slides.
        """
        return min(self._model.config.n_positions, n_tokens + max(self._tokens_left - 1, 0))

    def _compute(self, prompts: list[tuple[int, ...]], n_slots: int) -> tuple[KVCache | None, Tensor | None, Tensor]:
        """Return a cache of `n_slots` with distinct prompts, its mask, and the logits (B, V) of the token after each."""
        longest, past = max(map(len, prompts)), 0
        input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.ones(len(prompts), n_slots, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, : longest - len(prompt)] = 0
        on_device = None if bool(mask.all()) else mask.to(self._device)
        cache = self._new_cache(len(prompts), n_slots)
        if cache is not None:
            self._copy_beginnings(prompts, cache)
            past = cache.length
        n_tokens = len(prompts) * (longest - past)
        network: Network = EmbeddingNetwork(self._model, self._vectors) if self._vectors else self._network
        with self.timed("prefill", n_tokens.bit_length(), work=n_tokens):
            hidden = network.hidden_states(
                input_ids[:, past:].to(self._device),
                attention_mask=None if on_device is None else on_device[:, :longest],
                kv_cache=cache,
            )
            return cache, on_device, network.logits(hidden[:, -1])

    def _copy_beginnings(self, prompts: list[tuple[int, ...]], cache: KVCache) -> None:
        """Copy what is known of the prompts, and what several of them share, into the empty `cache`, if that saves time."""
        beginning, self._beginning = self._beginning, None
        # The ids are compared, because the window may have slid since the prefill was copied from another decoder.
        if beginning is not None and prompts[0][: len(beginning.ids)] == beginning.ids:
            beginning.fill(cache)
            return
        if self._prefixes is None:
            return
        plan, computed = self._prefixes.plan(prompts), []
        if plan.prefixes:
            of_prefixes, _, _ = self._compute(plan.prefixes, max(map(len, plan.prefixes)))
            assert of_prefixes is not None
            rows = enumerate(plan.prefixes)
            computed = [Prefix.of_row(of_prefixes, row, prefix, len(prefix)) for row, prefix in rows]
        if plan.n_new < max(map(len, prompts)):
            self._prefixes.fill(cache, prompts, plan, computed)

    def keep(self, rows: Sequence[int]) -> None:
        """Add the computed part of the windows with these indices to `prefixes`."""
        cache, mask = self._cache, self._mask
        if self._prefixes is None or cache is None:
            return
        for row in rows:
            n_tokens = cache.length if mask is None else int(mask[row, : cache.length].sum())
            ids = tuple(self.windows[row].visible_ids[:n_tokens])
            self._prefixes.add(Prefix.of_row(cache, row, ids, n_tokens))

    def _decode_one_token(self, cache: KVCache) -> Tensor:
        tokens = [window.ids[-1] for window in self.windows]
        if self._graphed and self._graphed.room(cache):
            return self._graphed.logits(tokens, cache)
        mask = None if self._mask is None else self._mask[:, : cache.length + 1]
        input_ids = torch.tensor(tokens, device=self._device)[:, None]
        with self.timed("decode", len(tokens)):
            hidden = self._network.hidden_states(input_ids, attention_mask=mask, kv_cache=cache)[:, -1]
            logits = self.logits(hidden)
        if self._graphed:
            self._graphed.watch(tokens, logits, cache, mask, self._tokens_left)
        return logits

    def _verify(self, drafts: Sequence[int], cache: KVCache) -> Tensor:
        """Return logits (1 + drafts, V) from one forward pass over the window's last token and the drafts.

        The pass reads each weight once for all of them.
        """
        input_ids = torch.tensor([[self.windows[0].ids[-1], *drafts]], device=self._device)
        mask = None if self._mask is None else self._mask[:, : cache.length + input_ids.shape[1]]
        network = self.verifier
        assert network is not None  # the caller has checked
        with self.timed("verify", len(drafts)):
            hidden = network.hidden_states(input_ids, attention_mask=mask, kv_cache=cache)[0]  # (1 + drafts, C)
            return self.logits(hidden) if network is self._network else network.logits(hidden)

    def timed(self, *kind: str | int, work: float = 1.0) -> AbstractContextManager[None]:
        """Measures a step of this kind: the number of threads follows what steps cost."""
        return threads.step((id(self._model), *kind), self._device, work)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (B, V) of hidden states (B, C), with `only_largest` by the greedy head if it is due."""
        logits = self._greedy_head.logits(hidden) if self._greedy_head and self.only_largest else None
        return self._network.logits(hidden) if logits is None else logits

    def _new_cache(self, batch_size: int, n_slots: int) -> KVCache | None:
        if not self._use_cache:
            return None
        model = self._model
        if self._make_cache is not None and self._plan is not None:  # without a plan its dtype could be wrong
            return self._make_cache(n_slots)
        dtype = model.dtype if self._plan is None or self._vectors else cache_dtype(model)  # the model computes with vectors
        return KVCache(model.config, batch_size=batch_size, max_length=n_slots, device=model.device, dtype=dtype)


def _n_unused(cache: KVCache, mask: Tensor | None) -> int:
    """Return how many slots at the beginning are padding in every row."""
    return 0 if mask is None else int(mask[:, : cache.length].amax(0).argmax())
