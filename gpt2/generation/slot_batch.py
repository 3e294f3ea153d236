"""SlotBatch: a `Batch` whose rows keep their keys and values in slots, so that rows join and leave without copying others.

Each row has a decoder of its own, whose cache is a slot. While one row runs, this decoder takes all steps, with its fast
paths. Several rows take their steps in one pass over the weights, in which each row attends to its own tokens only: there is
no padding, and a row that has ended costs nothing. A row with few tokens to compute begins in such a pass. In float32, short
prompts that begin at once take one pass too. The `beginning` of a row is copied into its slot, in every dtype. It needs a
model that `DecodePlan` fits, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gpt2.device import free_memory
from gpt2.fast.limits import FAST, FastLimits
from gpt2.fast.plan import DecodePlan, cache_dtype
from gpt2.generation.batch import Batch
from gpt2.generation.decoder import Decoder
from gpt2.generation.memory import memory_of_rows
from gpt2.generation.prefix_cache import PrefixCache, n_common
from gpt2.generation.row import Row
from gpt2.generation.slot_steps import PromptPart, SlotSteps
from gpt2.generation.steps import OneToken, Prefill, Step
from gpt2.kv_cache import KVCache
from gpt2.model import GPT2
from gpt2.quantization.derived import state_of
from gpt_config.errors import InputError
from gpt_config.validation import check_whole


class Slots:
    """Memory for the keys and values of `n_slots` rows of any lengths.

    It is one tensor (2, n_slots, n_head, n_positions, head_dim) for each layer. The system gives memory to what is written.
    """

    def __init__(self, model: GPT2, n_slots: int) -> None:
        check_whole("n_slots", n_slots, 1)
        config = model.config
        shape = (2, n_slots, config.n_head, config.n_positions, config.head_dim)
        self.layers = [torch.empty(shape, dtype=cache_dtype(model), device=model.device) for _ in range(config.n_layer)]
        self.free = list(range(n_slots))

    def cache(self, slot: int, n_tokens: int) -> KVCache:
        """Return an empty cache of `n_tokens` in a slot."""
        return KVCache.in_memory([layer[:, slot : slot + 1, :, :n_tokens] for layer in self.layers])


class SlotBatch(Batch):
    """A batch of at most `n_slots` rows: see the head of this file. Its interface is that of `Batch`.

    Raises InputError if more rows run at a time than there are slots. Beams take no slots. Rows have no embeddings here.
    """

    def __init__(
        self,
        model: GPT2,
        slots: Slots,
        *,
        vocab_size: int | None = None,
        draft_model: GPT2 | None = None,
        prefix_cache: PrefixCache | None = None,
        on_step: Callable[[Step], object] = lambda step: None,
        fast: FastLimits = FAST,
    ) -> None:
        super().__init__(
            model, vocab_size=vocab_size, draft_model=draft_model, prefix_cache=prefix_cache, on_step=on_step, fast=fast
        )
        self._slots = slots
        self._decoders: list[Decoder] = []  # of `_places`, in their order
        self._taken: list[int] = []  # their slots
        self._together: SlotSteps | None = None  # of all decoders; None without a plan
        self._state: object = None  # of the weights for which it was made
        self._along: PromptPart | None = None
        self._joins = False  # whether the next row begins in the step of the others

    @staticmethod
    def fits(model: GPT2) -> bool:
        """Return whether a model can run in slots."""
        return model.device.type == "cpu" and DecodePlan.fits(model)

    def take_along(self, ids: Sequence[int], cache: KVCache) -> bool:
        """Let the next step of the rows compute the next tokens `ids` of a prompt too, in the same pass over the weights.

        The step advances `cache`, which has one row and the dtype of `cache_dtype`. Returns False if the next step cannot:
        then the caller computes them.
        """
        rows = [row for row in self._places if row.finish_reason is None]
        self._along = None
        if rows and self._together is not None and not self._waiting and not self._searches:
            self._along = PromptPart(ids, cache)
        return self._along is not None

    def close(self) -> None:
        """Give all slots back. The rows that run must continue in another batch, which computes them again."""
        self._slots.free += self._taken
        self._places, self._decoders, self._taken, self._decoder = [], [], [], None

    def _prefill(self, n_rows: int) -> list[Row]:
        """Prefill the first `n_rows` waiting rows, and give each its first token; a row that `_joins`, in a step of all."""
        rows, others = self._waiting[:n_rows], self._places if self._joins else []
        if n_rows > len(self._slots.free):
            raise InputError(f"{n_rows} rows begin and {len(self._slots.free)} slots are free: admit fewer rows")
        self._check_plan()
        taken = [self._slots.free.pop() for _ in rows]
        try:
            decoders = [self._new_decoder(row, slot) for row, slot in zip(rows, taken, strict=True)]
            if len(rows) == 1 and not self._places:
                self._drafts(rows[0], decoders[0])  # speculation counts this step too
            logits = self._joint_logits(rows[0], decoders[0], taken[0]) if others else self._first_logits(decoders, taken)
        except BaseException:
            self._slots.free += taken
            raise
        for row in rows:
            row.beginning = None  # it is in the slot
        self._waiting, self._places = self._waiting[n_rows:], self._places + rows
        self._decoders, self._taken = self._decoders + decoders, self._taken + taken
        self._decoder = self._decoders[0]
        try:
            return self._give([*others, *rows], logits)
        except BaseException:
            for decoder in self._decoders if others else decoders:
                decoder.forget()
            raise

    def _check_plan(self) -> None:
        """Make a plan for the next decoders if the weights have changed since the last one."""
        state = state_of(*self._model.parameters())
        if state != self._state:
            self._state = state
            has_plan = self._fast.use_plan and DecodePlan.fits(self._model)
            plan = DecodePlan(self._model, only_last=True, limits=self._fast) if has_plan else None
            self._together = None if plan is None else SlotSteps(plan, self._slots.layers)

    def _new_decoder(self, row: Row, slot: int) -> Decoder:
        return Decoder(
            self._model,
            [row.window],
            row.n_tokens_left,
            only_largest=row.takes_only_the_largest,
            vocab_size=self._vocab_size,
            prefixes=self._prefix_cache,
            fast=self._fast,
            make_cache=lambda n_tokens: self._slots.cache(slot, n_tokens),
            plan=None if self._together is None else self._together.plan,
            beginning=row.beginning,
        )

    def _first_logits(self, decoders: Sequence[Decoder], slots: Sequence[int]) -> Tensor:
        """Return the logits (B, V) after the windows of B new decoders: equal ones computed once, short ones together."""
        windows = [tuple(decoder.windows[0].visible_ids) for decoder in decoders]
        found: dict[int, Tensor] = {}  # (1, V) by place
        for group in self._groups(decoders, windows):
            if len(group) == 1:
                logits = decoders[group[0]].next_logits().clone()
            else:
                assert self._together is not None
                logits = self._together.first_logits([decoders[place] for place in group], [slots[place] for place in group])
            found |= dict(zip(group, logits.split(1), strict=True))
        for place, decoder in enumerate(decoders):
            if place not in found:
                first = windows.index(windows[place])
                decoder.copy_prefill(decoders[first])
                found[place] = found[first]
        return torch.cat([found[place] for place in range(len(decoders))])

    def _can_join(self, row: Row) -> bool:
        """Whether a row can begin in the step of the others. A few tokens cost less there than in a pass of their own."""
        if self._together is None or not self._places or not DecodePlan.fits(self._model):
            return False
        if any(decoder.next_in_slot() is None for decoder in self._decoders):
            return False
        ids = row.window.visible_ids
        n_known = len(row.beginning.ids) if row.beginning else self._prefix_cache.find(ids)[0]
        return len(ids) - n_known <= self._fast.rows_to_join

    def _joint_logits(self, row: Row, decoder: Decoder, slot: int) -> Tensor:
        """Return the logits (B + 1, V) after the windows of the running rows and of a new one, with one pass for all."""
        assert self._together is not None and self._decoder is not None
        self._decoder.only_largest = all(one.takes_only_the_largest for one in [*self._places, row])
        caches = [cache for one in self._decoders if (cache := one.next_in_slot()) is not None]
        return self._together.next_logits(self._decoders, caches, self._taken, new=(decoder, slot))

    def _groups(self, decoders: Sequence[Decoder], windows: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """The places of distinct windows, in groups that are computed together.

        A window that has its beginning in common with another comes after it, so that the beginning can be copied.
        """
        most, group = self._fast.prompt_rows_together, list[int]()
        for window, place in {window: windows.index(window) for window in windows}.items():
            if len(window) > most or not decoders[place].can_begin_with_others:
                yield [place]
                continue
            is_full = sum(len(windows[other]) for other in group) + len(window) > most
            n_shared = max((n_common(windows[other], window) for other in group), default=0)
            if is_full or n_shared >= self._prefix_cache.min_tokens:
                yield group
                group = []
            group.append(place)
        if group:
            yield group

    def _next_step(self) -> Step | None:
        self._joins = False
        if self._waiting and not self._searches:
            n_rows = self._n_rows_to_prefill()
            self._joins = n_rows == 1 and self._can_join(self._waiting[0])
            return Prefill(n_rows, n_running=len(self._places) if self._joins else 0)
        if self._along is None or self._searches or not self._places:
            return super()._next_step()
        assert self._decoder is not None
        self._decoder.only_largest = False  # drafts, and several tokens at once, take a step without the prompt
        return OneToken(len(self._places))

    def _one_token(self) -> list[Row]:
        if len(self._decoders) == 1 and self._along is None:
            return super()._one_token()
        try:
            return self._give(self._places, self._logits())
        except BaseException:  # the caches contain a step for which no token was chosen
            for decoder in self._decoders:
                decoder.forget()
            raise

    def _logits(self) -> Tensor:
        """Return the logits (B, V) of all rows. A row that needs a prefill, after its window has slid, has it alone."""
        along, self._along = self._along, None
        found: dict[int, Tensor] = {}
        together: list[tuple[int, KVCache]] = []
        for place, decoder in enumerate(self._decoders):
            cache = decoder.next_in_slot()
            if cache is None:
                found[place] = decoder.next_logits()[0].clone()
            else:
                together.append((place, cache))
        if together:
            places, caches = zip(*together, strict=True)
            decoders, slots = [self._decoders[place] for place in places], [self._taken[place] for place in places]
            assert self._together is not None
            logits: Tensor = self._together.next_logits(decoders, caches, slots, along=along)
            if not found:
                return logits
            found |= dict(zip(places, logits, strict=True))
        width = min(map(len, found.values()))  # the greedy head has only the logits that may be chosen
        return torch.stack([found[place][:width] for place in range(len(self._decoders))])

    def _retire(self) -> None:
        """Remove ended rows, and give their slots back."""
        kept = [place for place, row in enumerate(self._places) if row.finish_reason is None]
        if len(kept) == len(self._places):
            return
        for place, (row, decoder) in enumerate(zip(self._places, self._decoders, strict=True)):
            if row.finish_reason is not None:
                if self._prefix_cache.keep_texts:
                    decoder.keep([0])
                self._slots.free.append(self._taken[place])
        self._places = [self._places[place] for place in kept]
        self._decoders = [self._decoders[place] for place in kept]
        self._taken = [self._taken[place] for place in kept]
        self._decoder = self._decoders[0] if kept else None
        self._one_at_a_time = False


def batch_of(
    model: GPT2,
    n_rows: int,
    *,
    vocab_size: int | None = None,
    draft_model: GPT2 | None = None,
    on_step: Callable[[Step], object] = lambda step: None,
) -> Batch:
    """Return the fastest batch for many rows of which at most `n_rows` run at a time: one with slots where these fit.

    Slots are for whole contexts, so they must fit into half of the free memory; a `Batch` takes what its texts need.
    """
    free, config = free_memory(model.device), model.config
    needed = memory_of_rows(config, n_rows, config.n_positions, cache_dtype(model).itemsize)
    if not SlotBatch.fits(model) or free is None or 2 * needed > free:
        return Batch(model, vocab_size=vocab_size, draft_model=draft_model, on_step=on_step)
    return SlotBatch(model, Slots(model, n_rows), vocab_size=vocab_size, draft_model=draft_model, on_step=on_step)
