"""PrefixCache: keys and values of texts that were computed before, found by their ids. It depends on no model.

A token's keys and values depend only on the tokens before it. Prompts with a common beginning, and the turns of a
conversation, therefore need those of the beginning only once. `Decoder` copies them into the cache of its rows.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gpt2.kv_cache import KVCache
from gpt_config.validation import check_whole

# Texts whose ids are kept, without keys and values, to notice the second text with the same beginning.
_N_SEEN = 64

# Lengths of the last part that `plan` tries. Each costs about as much time as sorting the prompts.
_N_TRIED = 32


@dataclass(frozen=True)
class Prefix:
    """The ids of a text, and its keys and values: one tensor (2, n_head, tokens, head_dim) for each layer."""

    ids: tuple[int, ...]
    layers: Sequence[Tensor]

    @classmethod
    def of_row(cls, cache: KVCache, row: int, ids: tuple[int, ...], n_tokens: int) -> Prefix:
        """Return the tokens `ids` that begin a row of `cache`; the row's `n_tokens` tokens are in the last slots."""
        first = cache.length - n_tokens
        return cls(ids, [layer[:, row, :, first : first + len(ids)] for layer in cache.layers])

    @property
    def n_bytes(self) -> int:
        """The memory of its keys and values."""
        return sum(layer.numel() * layer.itemsize for layer in self.layers)

    def fill(self, cache: KVCache) -> None:
        """Store the keys and values in an empty cache of one row."""
        for into, layer in zip(cache.layers, self.layers, strict=True):
            into[:, 0, :, : len(self.ids)] = layer
        cache.advance(len(self.ids))

    def copied(self, n_tokens: int) -> Prefix:
        """Return the first `n_tokens` tokens in memory of their own."""
        return Prefix(self.ids[:n_tokens], [layer[:, :, :n_tokens].clone() for layer in self.layers])


@dataclass(frozen=True)
class Plan:
    """How to compute prompts: first `prefixes`, in a pass of their own, then the last `n_new` tokens of each prompt.

    `found` has, for each prompt, the kept text with the longest common beginning, and the length of that beginning.
    """

    n_new: int
    prefixes: list[tuple[int, ...]]
    found: list[tuple[int, Prefix | None]]


class PrefixCache:
    """Keys and values of the beginnings of texts, at most `max_bytes`. Those that were not used for longest are dropped.

    It keeps a beginning that two prompts have in common, and with `keep_texts` also every complete text of a row that
    ended, as a conversation needs. Beginnings are used if that saves the computation of `min_tokens` tokens.

    One cache belongs to one model. `Decoder` empties it when the model's weights have been replaced or changed by torch's
    operations; changes through `weight.data` are not noticed: call `clear`. `n_reused` counts the tokens that were copied in
    place of being computed.
    """

    def __init__(self, max_bytes: int = 2**28, *, min_tokens: int = 32, keep_texts: bool = False) -> None:
        check_whole("max_bytes", max_bytes, 0)
        check_whole("min_tokens", min_tokens, 1)
        self.max_bytes, self.min_tokens, self.keep_texts = max_bytes, min_tokens, keep_texts
        self.n_reused = 0
        self._kept: list[Prefix] = []  # the most recently used last
        self._seen: deque[tuple[int, ...]] = deque(maxlen=_N_SEEN)
        self._model_state: object = None

    @property
    def n_bytes(self) -> int:
        """The memory of the keys and values."""
        return sum(prefix.n_bytes for prefix in self._kept)

    def clear(self) -> None:
        """Forget all texts."""
        self._kept.clear()
        self._seen.clear()

    def use_for(self, model_state: object) -> None:
        """Forget all texts unless they were computed by a model in this state."""
        if self._model_state != model_state:
            self.clear()
            self._model_state = model_state

    def find(self, ids: Sequence[int]) -> tuple[int, Prefix | None]:
        """Return how many of the first tokens of a text have keys and values here, and the kept text that has them."""
        known = ((n_common(prefix.ids, tuple(ids)), prefix) for prefix in self._kept)
        return max(known, key=lambda found: found[0], default=(0, None))

    def plan(self, prompts: Sequence[tuple[int, ...]]) -> Plan:
        """Return how to compute distinct prompts so that the fewest tokens are computed, padding included."""
        found, longest = [self.find(prompt) for prompt in prompts], max(map(len, prompts))
        known = [min(n, len(prompt) - 1) for (n, _), prompt in zip(found, prompts, strict=True)]
        least, best = len(prompts) * longest - self.min_tokens + 1, Plan(longest, [], found)
        for n_new in _lengths_to_try(prompts, known, self.min_tokens):
            of_prompt = zip(prompts, known, strict=True)
            prefixes = _without_beginnings([prompt[:-n_new] for prompt, n in of_prompt if len(prompt) - n_new > n])
            n_computed = len(prompts) * n_new + len(prefixes) * max(map(len, prefixes), default=0)
            if n_computed < least:
                least, best = n_computed, Plan(n_new, prefixes, found)
        return best

    def fill(self, cache: KVCache, prompts: Sequence[tuple[int, ...]], plan: Plan, computed: Sequence[Prefix]) -> None:
        """Store all but the last `plan.n_new` tokens of each prompt in an empty cache, padded on the left.

        They are copied from kept texts or from `computed`, which are `plan.prefixes`. Those of them that several prompts
        share are kept.
        """
        past = max(map(len, prompts)) - plan.n_new
        uses: Counter[int] = Counter()
        for row, (prompt, (n_known, kept)) in enumerate(zip(prompts, plan.found, strict=True)):
            n = max(0, len(prompt) - plan.n_new)
            for layer in cache.layers:
                layer[:, row, :, : past - n] = 0  # padding is masked, but NaN times a weight of 0 would be NaN
            if n == 0:
                continue
            if n <= n_known and kept is not None:
                source = kept
                self._set_last(source)
            else:
                source = next(prefix for prefix in computed if prefix.ids[:n] == prompt[:n])
                uses[id(source)] += 1
            for into, layer in zip(cache.layers, source.layers, strict=True):
                into[:, row, :, past - n : past] = layer[:, :, :n]
            self.n_reused += n
        cache.advance(past)
        for prefix in computed:
            self.n_reused -= len(prefix.ids)
            if uses[id(prefix)] > 1:
                self.add(prefix)

    def note(self, prompts: Sequence[tuple[int, ...]], cache: KVCache) -> None:
        """Keep the beginning that each prompt has in common with an earlier one. `cache` ends with the prompts' tokens."""
        for row, prompt in enumerate(prompts):
            n_shared = max((n_common(seen, prompt) for seen in self._seen), default=0)
            if n_shared >= self.find(prompt)[0] + self.min_tokens:
                self.add(Prefix.of_row(cache, row, prompt[:n_shared], len(prompt)))
            self._seen.append(prompt)

    def add(self, prefix: Prefix) -> None:
        """Keep a copy of a text's keys and values; of one that is too long, of its beginning."""
        n_tokens = len(prefix.ids)
        if n_tokens and prefix.n_bytes > self.max_bytes:
            n_tokens = n_tokens * self.max_bytes // prefix.n_bytes
        if not n_tokens or self.find(prefix.ids[:n_tokens])[0] == n_tokens:
            return
        new = prefix.copied(n_tokens)
        self._kept = [old for old in self._kept if new.ids[: len(old.ids)] != old.ids]
        self._kept.append(new)
        while self.n_bytes > self.max_bytes:
            del self._kept[0]

    def _set_last(self, prefix: Prefix) -> None:
        """Count a kept text as the most recently used."""
        self._kept.sort(key=lambda kept: kept is prefix)


def n_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common beginning.

    >>> n_common([1, 2, 3], [1, 2, 4, 5])
    2
    """
    low, high = 0, min(len(first), len(second))
    while low < high:  # comparing slices is much faster than comparing ids one by one in Python
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


def _lengths_to_try(prompts: Sequence[tuple[int, ...]], known: Sequence[int], min_tokens: int) -> list[int]:
    """Return lengths of the last part of each prompt for which a beginning is known or shared with another prompt."""
    lengths = {len(prompt) - n for prompt, n in zip(prompts, known, strict=True) if n >= min_tokens}
    in_order = sorted(prompts)
    for first, second in itertools.pairwise(in_order):
        n_shared = n_common(first, second)
        if n_shared >= min_tokens:
            lengths |= {len(first) - n_shared, len(second) - n_shared}
    found = sorted(lengths - {0})  # 0: a prompt that is the beginning of another; its last token gives its logits
    return found if len(found) <= _N_TRIED else [found[i * (len(found) - 1) // (_N_TRIED - 1)] for i in range(_N_TRIED)]


def _without_beginnings(prefixes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the distinct prefixes that are not the beginning of another one."""
    in_order = sorted(set(prefixes))  # directly after a prefix comes one that begins with it, if there is one
    pairs = itertools.pairwise([*in_order, ()])
    return [prefix for prefix, following in pairs if following[: len(prefix)] != prefix]
