"""Lane: the rows of one model that have a slot, and what is kept of prompts. It knows jobs and batches, not their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpt2.fast.plan import DecodePlan
from gpt2.generation.batch import Batch
from gpt2.generation.prefix_cache import Prefix, PrefixCache
from gpt2.generation.row import Row
from gpt2.generation.slot_batch import SlotBatch, Slots
from gpt2.generation.steps import Step
from gpt2.kv_cache import KVCache
from gpt2.quantization.derived import state_of
from gpt2.quantization.quantize import is_int8
from gpt2.serving.job import Choice
from gpt2.serving.models import Served


class Lane:
    """The rows of one model: its batch, and the choice of each row that has a slot."""

    def __init__(self, served: Served, n_slots: int) -> None:
        self.served, model = served, served.model
        self.choices: dict[int, Choice] = {}  # by the row's id
        self.is_left = False  # whether a row was taken out of the batch since its last step
        self.n_along = 0  # tokens of a prompt that the next step computes too
        self.n_joining = 0  # tokens of prompts that were admitted to the batch and are not yet computed
        self.step: Step | None = None  # the last one of the batch
        self.prefixes = PrefixCache(max(2**28, 2 * served.bytes_per_slot), keep_texts=True)
        self.prefixes.use_for(state_of(*model.parameters()))
        # Where `Decoder` uses the prefixes.
        self.reuses = model.dtype in (torch.float32, torch.float64) and not is_int8(model) and DecodePlan.fits(model)
        self._slots = Slots(model, n_slots) if SlotBatch.fits(model) else None
        self.batch = self._new_batch()

    def renew(self) -> None:
        """Begin with an empty batch."""
        if isinstance(self.batch, SlotBatch):
            self.batch.close()
        self.batch = self._new_batch()

    def _new_batch(self) -> Batch:
        model, vocab_size, draft_model = self.served.model, self.served.tokenizer.vocab_size, self.served.draft_model
        options: dict[str, Any] = {
            "vocab_size": vocab_size,
            "draft_model": draft_model,
            "prefix_cache": self.prefixes,
            "on_step": self._note,
        }
        return Batch(model, **options) if self._slots is None else SlotBatch(model, self._slots, **options)

    def _note(self, step: Step) -> None:
        self.step = step

    @property
    def n_running(self) -> int:
        """Rows in the batch that have not ended."""
        return sum(row.finish_reason is None for row in self.batch.rows)

    def admit(self, row: Row, n_new: int) -> None:
        """Let a row join the batch. `n_new` tokens of its prompt have no keys and values yet."""
        self.batch.admit([row])
        self.n_joining += n_new

    def take_along(self, ids: Sequence[int], cache: KVCache) -> bool:
        """Let the next step of the rows compute these tokens of a prompt too: see `SlotBatch.take_along`."""
        is_taken = isinstance(self.batch, SlotBatch) and self.n_running > 0 and self.batch.take_along(ids, cache)
        self.n_along = len(ids) if is_taken else 0
        return is_taken

    def alone(self) -> Batch:
        """A batch for a row that is tried alone."""
        return Batch(self.served.model, vocab_size=self.served.tokenizer.vocab_size)

    def n_to_compute(self, row: Row) -> int:
        """How many tokens of a prompt have no keys and values yet."""
        ids = row.window.visible_ids
        return len(ids) - (len(row.beginning.ids) if row.beginning else self.prefixes.find(ids)[0])

    def computes_in_parts(self, *, beside_others: bool) -> bool:
        """Whether a long prompt is computed in parts. In fewer bits they are rounded differently, so only beside others."""
        return self.reuses or (beside_others and self._slots is not None)

    def keep(self, beginning: Prefix, choice: Choice) -> None:
        """Give a beginning to the choice for which it was computed, and to those of its prompt that have not begun."""
        if self.reuses:
            self.prefixes.add(beginning)
            return
        n_ids, n_tokens = len(choice.row.window.ids), len(beginning.ids)
        for row in (other.row for other in choice.job.choices):
            if len(row.window.ids) == n_ids and tuple(row.window.ids[:n_tokens]) == beginning.ids:
                row.beginning = beginning
