"""CUDA graphs: decode steps of fixed shapes, which a GPU replays without Python. It depends on the model and its cache.

A step of the 124M model is about 150 kernels of a few microseconds each. Launching them one by one takes the CPU longer than
the GPU needs to run them; a graph launches all of them at once. It replays the same kernels on the same addresses, so only
the contents of tensors may differ between steps. A tensor contains the slot for the new keys and values. A token attends to
a fixed number of slots, and later ones are masked. The greedy token is written to where the next step reads it.

The step calls the model's own blocks and runs on any device. Only `captured` needs CUDA; its speed was not measured. The
tests record and replay a step on a CPU, operation by operation. On a GPU, each graph must first reproduce a step that was
computed without it. If it does not, or if recording fails, steps are computed without a graph.
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

# Largest allowed difference between a graph's result and the expected one, as a fraction of the largest number of the row.
# It is far above rounding errors, and below the error of gpt2-tiny's logits for a position off by one (0.07).
_TOLERANCE = 0.01

# The same in 16 bits, whose rounding errors are larger. It is a weaker check.
_TOLERANCE_16_BITS = 0.1

# Recorders and devices for which recording has failed. It is not tried again in this process.
_refused: set[tuple[Recorder, torch.device]] = set()


class GraphedSteps:
    """The replayed steps of one generation: one token for each row of a cache, as `GPT2.forward` computes it.

    Call `watch` after each step that was computed without a graph, and `forget` when the rows or the cache's tensors change.
    `greedy_tokens` chooses among the first `vocab_size` logits. Call it without gradients.
    """

    def __init__(self, model: GPT2, vocab_size: int | None, limits: GraphLimits = GRAPHS) -> None:
        self._model, self._vocab_size, self._limits = model, vocab_size, limits
        self._recorder = limits.recorder or captured
        self._is_sound = True
        self.forget()

    @staticmethod
    def fits(model: GPT2, limits: GraphLimits = GRAPHS) -> bool:
        """Return whether the model's device has graphs. The caller has checked that the model computes as written."""
        return limits.recorder is not None or model.device.type == "cuda"

    def forget(self) -> None:
        """Drop the graph, because the next steps have other rows or another cache."""
        self._n_watched = 0
        self._step: GraphedStep | None = None
        self._replay: Callable[[], object] | None = None

    def room(self, cache: KVCache) -> int:
        """Return how many steps can be replayed now."""
        # After drafts, the cache may be longer than the graph's slots.
        return 0 if self._step is None else max(0, self._step.n_slots - cache.length)

    def is_to_come(self, room: int, steps_left: int) -> bool:
        """Return whether a graph will be recorded, if the cache has `room` slots left and `steps_left` steps remain.

        Until then, compute single steps, so that `watch` sees them.
        """
        is_refused = (self._recorder, self._model.device) in _refused
        return self._is_sound and not is_refused and room > 0 and steps_left >= self._limits.steps_left

    def watch(
        self, tokens: Sequence[int], logits: Tensor, cache: KVCache, attention_mask: Tensor | None, steps_left: int
    ) -> None:
        """Observe a step that has stored `tokens` (B) in the cache and returned `logits` (B, V).

        After `steps_before` such steps, it records a graph for the next ones. The graph must first reproduce the observed
        step; if it does not, a GPT2Warning is issued and no graph is used. `attention_mask` (B, S) is 0 for padding, which
        must be at the start of rows.
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
        warnings.warn(f"no CUDA graph could be recorded ({fault}): generation continues without it, slower", GPT2Warning, 2)

    def logits(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        """Store one token of each row in the cache. Returns the next logits (B, V), which the next step overwrites."""
        return self._run(tokens, 1, cache).logits

    def greedy_tokens(self, token: int, n: int, cache: KVCache) -> list[tuple[int, float]]:
        """For a single row, decode `n` greedy tokens after `token`. Returns (token, logit) of each."""
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
    """A step that decodes one token for each row.

    It reads its inputs from tensors of this object, and then writes the inputs of the next step into them.
    """

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
        # References keep the weights in memory at the addresses that the graph has recorded.
        self._weights = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        device = model.device
        n_rows = cache.layers[0].shape[1]
        self._tokens = torch.zeros(n_rows, 1, dtype=torch.int64, device=device)
        self._slots = torch.arange(self.n_slots, device=device)
        self._slot = self._slots[-1:].clone()  # the last slot, which is not in use while the step is recorded
        self._store = _SlotStore(cache, self.n_slots, self._slot)
        self.logits = torch.zeros(n_rows, model.config.vocab_size, dtype=model.dtype, device=device)
        # (slots, rows): the greedy token after the token in this slot.
        self.chosen = torch.zeros(self.n_slots, n_rows, dtype=torch.int64, device=device)
        # (slots, rows): the logit of that greedy token.
        self.largest = torch.zeros(self.n_slots, n_rows, dtype=model.dtype, device=device)

    def place(self, tokens: Sequence[int], slot: int) -> None:
        """Set the tokens (B) of the next step, and the slot that their keys and values are stored in."""
        self._tokens.copy_(torch.tensor(tokens)[:, None])
        self._slot.fill_(slot)

    def clear(self, n_used: int) -> None:
        """Zero the slots after the first `n_used`. They are masked, but a weight of 0 times NaN would be NaN."""
        for layer in self._store.layers:
            layer[:, :, :, n_used:] = 0

    def stored(self, slot: int) -> Tensor:
        """Return a copy of the keys and values in a slot: (n_layer, 2, B, n_head, head_dim)."""
        return torch.stack([layer[:, :, :, slot] for layer in self._store.layers])

    def store(self, slot: int, stored: Tensor) -> None:
        """Write a copy made by `stored` back into a slot."""
        for layer, of_layer in zip(self._store.layers, stored, strict=True):
            layer[:, :, :, slot] = of_layer

    def fault(self, slot: int, logits: Tensor, stored: Tensor) -> str:
        """Compare the last step, into `slot`, with the expected `logits` and `stored` keys and values.

        Returns a description of the first difference, or "" if there is none.
        """
        tolerance = _TOLERANCE_16_BITS if logits.itemsize == 2 else _TOLERANCE
        kept = self.stored(slot)
        for what, found, right in (("logits", self.logits, logits), ("keys and values", kept.flatten(3), stored.flatten(3))):
            error = _relative_error(found, right)
            if not error <= tolerance:
                return f"its {what} differ by {error:.2g} of the largest"
        chosen = self.logits[:, : self._vocab_size].max(1).indices.tolist()
        is_ready = self._tokens[:, 0].tolist() == chosen == self.chosen[slot].tolist()
        return "" if is_ready and self._slot.tolist() == [min(slot + 1, self.n_slots - 1)] else "its next input is wrong"

    def __call__(self) -> None:
        model, slot = self._model, self._slot
        visible, positions = self._slots <= slot, slot
        if self._n_padding is not None:
            visible, positions = visible & (self._slots >= self._n_padding), slot - self._n_padding
        # An additive mask, made once; with a boolean mask, every layer would convert it again.
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
    """A `KVStore` in the tensors of a cache; the slot for new keys and values is in a tensor."""

    def __init__(self, cache: KVCache, n_slots: int, slot: Tensor) -> None:
        self._slot = slot
        self.layers = [layer[:, :, :, :n_slots] for layer in cache.layers]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values, each (B, n_head, 1, head_dim). Returns all slots, each (B, n_head, S, head_dim)."""
        k, v = self.layers[layer].unbind()
        return k.index_copy_(2, self._slot, keys), v.index_copy_(2, self._slot, values)


def _relative_error(found: Tensor, right: Tensor) -> float:
    """Return the largest difference between `found` and `right`, both (..., N), relative to the largest number of the row.

    The mean of each row is subtracted before.
    """
    found, right = (x.float() - x.float().mean(-1, keepdim=True) for x in (found, right))
    scale = right.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((found - right).abs().amax(-1) / scale).max())


# One stream for each device, because libraries keep memory for every stream that they are used on.
_streams: dict[torch.device, torch.cuda.Stream] = {}

# Only one graph is recorded at a time.
_recording = threading.Lock()


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record `step` as a CUDA graph. Returns a function that replays it. Raises RuntimeError if it cannot be recorded.

    As torch's notes on CUDA recommend, `step` first runs twice on a side stream, so that libraries are initialised, and is
    recorded there. Meanwhile other threads may compute on the device, but may not synchronize with it.
    """
    with _recording, torch.cuda.device(device):
        if device not in _streams:
            _streams[device] = torch.cuda.Stream()
        current, side = torch.cuda.current_stream(), _streams[device]
        side.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):  # the current stream is restored also after an exception
            for _ in range(2):
                step()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                step()
        current.wait_stream(side)
    return graph.replay
