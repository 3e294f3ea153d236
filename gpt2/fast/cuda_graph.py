"""Decode steps of fixed shapes, which a GPU replays without Python: CUDA graphs.

A step of the 124M model is some 150 kernels of a few microseconds each. To launch them one by one takes a processor longer
than a GPU needs for them; a graph launches them all at once. It replays the same kernels on the same addresses, so only
what stands in tensors may differ from step to step: keys and values go to the slot that a tensor names, a token sees a fixed
number of slots with those after it masked, and the most probable token is left where the next step reads it.

The step is made of the model's own blocks and runs on any device; only `captured` needs CUDA, and was not measured: the
tests record and replay a step on a CPU, operation by operation, and on a GPU each graph must first repeat a step that was
computed without it. Where it does not, or where none can be recorded, tokens come without it, as before.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpt2.fast.limits import GRAPHS, GraphLimits, Recorder
from gpt2.kv_cache import KVCache
from gpt2.model import GPT2
from gpt_config.errors import GPT2Warning

# How far what a graph computes may be from what was computed without it, by the largest number of its row: by far more than
# roundings differ, and less than by what a position off by one does to gpt2-tiny's logits (7%). In 16 bits it says less.
_TOLERANCE, _TOLERANCE_16_BITS = 0.01, 0.1

# Where recording has failed it is not tried again in this process.
_refused: set[tuple[Recorder, torch.device]] = set()


class GraphedSteps:
    """The steps of one generation that are replayed: single tokens for each row of a cache, as `GPT2.forward` computes them.

    Show it each step that was computed without it by `watch`, and `forget` the rows when they, or the cache's tensors, are
    others. `greedy_tokens` follows the largest of the first `vocab_size` logits. Call it without gradients.
    """

    def __init__(self, model: GPT2, vocab_size: int | None, limits: GraphLimits = GRAPHS) -> None:
        self._model, self._vocab_size, self._limits = model, vocab_size, limits
        self._recorder = limits.recorder or captured
        self._is_sound = True
        self.forget()

    @staticmethod
    def fits(model: GPT2, limits: GraphLimits = GRAPHS) -> bool:
        """Whether there are graphs where the model is. That it computes as written, the caller has asked before."""
        return limits.recorder is not None or model.device.type == "cuda"

    def forget(self) -> None:
        """The next steps are those of other rows."""
        self._n_watched = 0
        self._step: GraphedStep | None = None
        self._replay: Callable[[], object] | None = None

    def room(self, cache: KVCache) -> int:
        """How many steps can be replayed now."""
        return 0 if self._step is None else max(0, self._step.n_slots - cache.length)  # drafts may have gone beyond

    def is_to_come(self, room: int, steps_left: int) -> bool:
        """Whether there will be a graph, if the cache has so much `room` after the next step, `steps_left` before the end.
        Until then steps are to be taken one by one, for `watch` to see them."""
        is_refused = (self._recorder, self._model.device) in _refused
        return self._is_sound and not is_refused and room > 0 and steps_left >= self._limits.steps_left

    def watch(
        self, tokens: Sequence[int], logits: Tensor, cache: KVCache, attention_mask: Tensor | None, steps_left: int
    ) -> None:
        """A step has read `tokens` (B) into the cache and gave `logits` (B, V). If it is time, a graph for the next ones is
        recorded, which must first do the same; a GPT2Warning if it does not.

        `attention_mask` (B, S) is 0 at padding, which is at the start of rows.
        """
        self._n_watched += 1
        is_time = self._n_watched >= self._limits.steps_before and self.is_to_come(
            cache.max_length - cache.length, steps_left
        )
        if not (is_time and bool(logits.isfinite().all())):
            return
        n_padding = None if attention_mask is None else (attention_mask == 0).sum(1, keepdim=True)
        step, slot = GraphedStep(self._model, cache, n_padding, self._vocab_size, self._limits), cache.length - 1
        stored = step.stored(slot)
        try:
            replay = self._recorder(step, self._model.device)
            step.place(tokens, slot)
            step.clear(slot)
            replay()
            fault = step.fault(slot, logits, stored)
        except RuntimeError as error:
            _refused.add((self._recorder, self._model.device))
            fault = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if not fault:
            self._step, self._replay = step, replay
            return
        self._is_sound = False
        step.store(slot, stored)
        warnings.warn(f"no CUDA graph could be recorded ({fault}): the same tokens come, more slowly", GPT2Warning, 2)

    def logits(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        """Read a token of each row into the cache: logits (B, V) of what follows, until the next step writes over them."""
        return self._run(tokens, 1, cache).logits

    def greedy_tokens(self, token: int, n: int, cache: KVCache) -> list[tuple[int, float]]:
        """For a single row: `n` tokens after `token`, each the most probable one and read for the next; their logits."""
        past = cache.length
        step = self._run([token], n, cache)
        chosen, largest = (of_slots[past : past + n, 0].tolist() for of_slots in (step.chosen, step.largest))
        return list(zip(chosen, largest, strict=True))

    def _run(self, tokens: Sequence[int], n: int, cache: KVCache) -> GraphedStep:
        step, replay = self._step, self._replay
        assert step is not None and replay is not None and n <= self.room(cache)
        step.place(tokens, cache.length)
        cache.check_fit(self._model.config, len(tokens), n, self._model.wpe.weight)
        for _ in range(n):
            replay()
        cache.advance(n)
        return step


class GraphedStep:
    """One token for each row, from tensors that stand here into others; then they are as the next step wants them."""

    def __init__(
        self,
        model: GPT2,
        cache: KVCache,
        n_padding: Tensor | None,
        vocab_size: int | None,
        limits: GraphLimits = GRAPHS,
    ) -> None:
        self._model, self._n_padding, self._vocab_size = model, n_padding, vocab_size
        self.n_slots = min(cache.max_length, (cache.length // limits.slots_at_once + 1) * limits.slots_at_once)
        self._weights = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]  # they stay where they are
        device = model.device
        n_rows = cache.layers[0].shape[1]
        self._tokens = torch.zeros(n_rows, 1, dtype=torch.int64, device=device)
        self._slots = torch.arange(self.n_slots, device=device)
        self._slot = self._slots[-1:].clone()  # the last, which is free while the step is recorded
        self._store = _SlotStore(cache, self.n_slots, self._slot)
        self.logits = torch.zeros(n_rows, model.config.vocab_size, dtype=model.dtype, device=device)
        # By slot and row: the most probable token after what was read into it, and its logit.
        self.chosen = torch.zeros(self.n_slots, n_rows, dtype=torch.int64, device=device)
        self.largest = torch.zeros(self.n_slots, n_rows, dtype=model.dtype, device=device)

    def place(self, tokens: Sequence[int], slot: int) -> None:
        """What the next step reads, and the slot it goes to."""
        self._tokens.copy_(torch.tensor(tokens)[:, None])
        self._slot.fill_(slot)

    def clear(self, n_used: int) -> None:
        """Empty the slots after the first `n_used`: what is masked has no weight, but no weight times NaN would be NaN."""
        for layer in self._store.layers:
            layer[:, :, :, n_used:] = 0

    def stored(self, slot: int) -> Tensor:
        """A copy of the keys and values in a slot: (n_layer, 2, B, n_head, head_dim)."""
        return torch.stack([layer[:, :, :, slot] for layer in self._store.layers])

    def store(self, slot: int, stored: Tensor) -> None:
        """Put such a copy back."""
        for layer, of_layer in zip(self._store.layers, stored, strict=True):
            layer[:, :, :, slot] = of_layer

    def fault(self, slot: int, logits: Tensor, stored: Tensor) -> str:
        """What a step into `slot` has done otherwise than one that gave these `logits` and stored this; "" if nothing."""
        tolerance = _TOLERANCE_16_BITS if logits.itemsize == 2 else _TOLERANCE
        kept = self.stored(slot)
        for what, found, right in (("logits", self.logits, logits), ("keys and values", kept.flatten(3), stored.flatten(3))):
            error = _relative_error(found, right)
            if not error <= tolerance:
                return f"its {what} are off by {error:.2g} of the largest"
        chosen = self.logits[:, : self._vocab_size].max(1).indices.tolist()
        is_ready = self._tokens[:, 0].tolist() == chosen == self.chosen[slot].tolist()
        return "" if is_ready and self._slot.tolist() == [min(slot + 1, self.n_slots - 1)] else "it does not go on"

    def __call__(self) -> None:
        model, slot = self._model, self._slot
        visible, positions = self._slots <= slot, slot
        if self._n_padding is not None:
            visible, positions = visible & (self._slots >= self._n_padding), slot - self._n_padding
        # What is to be added, made once: of truth values every layer would make that for itself.
        mask = torch.zeros(visible.shape, dtype=self.logits.dtype, device=slot.device).masked_fill_(~visible, -math.inf)
        mask = mask.view(-1, 1, 1, self.n_slots)  # (B or 1, 1, 1, S)
        hidden = model.stream(model.embed(self._tokens, positions), mask, self._store)  # (B, 1, C)
        self.logits.copy_(model.logits(hidden[:, -1]))
        largest, chosen = self.logits[:, : self._vocab_size].max(1)
        self.chosen.index_copy_(0, slot, chosen[None])
        self.largest.index_copy_(0, slot, largest[None])
        self._tokens.copy_(chosen[:, None])
        slot.add_(1).clamp_(max=self.n_slots - 1)


class _SlotStore:
    """The tensors of a cache, to which keys and values go by the slot that a tensor names."""

    def __init__(self, cache: KVCache, n_slots: int, slot: Tensor) -> None:
        self._slot = slot
        self.layers = [layer[:, :, :, :n_slots] for layer in cache.layers]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, n_head, 1, head_dim) each; return the same for all slots."""
        k, v = self.layers[layer].unbind()
        return k.index_copy_(2, self._slot, keys), v.index_copy_(2, self._slot, values)


def _relative_error(found: Tensor, right: Tensor) -> float:
    """By how much (..., N) differ from what is right, at most: less each row's mean, by the largest number of the row."""
    found, right = (x.float() - x.float().mean(-1, keepdim=True) for x in (found, right))
    scale = right.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((found - right).abs().amax(-1) / scale).max())


# One stream a device, for libraries keep memory for each that they meet, and one recording at a time.
_streams: dict[torch.device, torch.cuda.Stream] = {}
_recording = threading.Lock()


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` as a CUDA graph, as torch's notes on CUDA say: run twice on a stream aside, for what libraries do at first, and
    recorded there. RuntimeError if it cannot be. Meanwhile other threads may compute on the device, but not wait for it.
    """
    with _recording, torch.cuda.device(device):
        if device not in _streams:
            _streams[device] = torch.cuda.Stream()
        here, aside = torch.cuda.current_stream(), _streams[device]
        aside.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):  # which is left whatever happens
            for _ in range(2):
                step()
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                step()
        here.wait_stream(aside)
    return graph.replay
