"""FastLimits: when each fast path is used, as one value that callers pass on. It contains settings only.

The defaults saved time in measurements on a CPU. Tests pass other values, so that small models use the paths of large ones.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from gpt2.quantization.kernels import ENGINES

# (step, device) -> a function that replays the step.
Recorder = Callable[[Callable[[], None], torch.device], Callable[[], object]]


@dataclass(frozen=True)
class GreedyHeadLimits:
    """When a `GreedyHead` saves time."""

    # Bytes. Smaller heads stay in the processor's cache, where reading less saves no time.
    min_bytes: int = 2**25

    # New tokens. For fewer, checking whether the weights have changed takes as long as the head saves.
    min_steps: int = 16

    # For each dtype: the steps before the head is quantized, and the largest number of rows for which it then saves time.
    # Quantizing takes as long as it saves in that many steps. So a shorter text has no additional cost, and a longer one at
    # most twice the lowest possible cost.
    pays: Mapping[torch.dtype, tuple[int, int]] = field(
        default_factory=lambda: {torch.float32: (112, 16), torch.float16: (112, 16), torch.bfloat16: (640, 1)}
    )

    # Fraction of the vocabulary. If more tokens need the full weights, nothing is saved.
    max_part: float = 1 / 32

    # Rows of the head that are packed together. Smaller parts are packed faster, but multiplied more slowly.
    rows_of_part: int = 25600

    # Names of torch's int8 kernels that may be used.
    engines: Sequence[str] = ENGINES


GREEDY_HEAD = GreedyHeadLimits()


@dataclass(frozen=True)
class GraphLimits:
    """When steps are recorded as CUDA graphs. Estimated; not measured on a GPU."""

    # Steps of the same rows before a graph is recorded. Beam search changes the rows at each step.
    steps_before: int = 2

    # Steps that must remain. Recording takes about as long as five steps without a graph.
    steps_left: int = 16

    # Cache slots. A graph covers the slots up to a multiple of this, then another is recorded. Attention reads all of them,
    # also those without a token.
    slots_at_once: int = 256

    # The function that records a step, for any device. None: `cuda_graph.captured`, for CUDA.
    recorder: Recorder | None = None


GRAPHS = GraphLimits()


@dataclass(frozen=True)
class FastLimits:
    """Which fast paths may be used, and from how many rows on."""

    # False: the model itself computes each step.
    use_plan: bool = True

    # False: Python runs the functions that TorchScript otherwise runs.
    use_torchscript: bool = True

    # False: bfloat16 layers compute as in the model, without packing.
    pack_bfloat16: bool = True

    # False: float16 layers compute as in the model, without packing.
    pack_float16: bool = True

    # Whether MKL's products in float32 are avoided. None: `device` decides by the processor's maker.
    avoid_mkl: bool | None = None

    # Bytes of a layer's weights. Smaller ones are multiplied by MKL.
    min_bytes_without_mkl: int = 2**16

    # Whether single rows in bfloat16 are multiplied by weights in float16. None: if the CPU has no matrix units.
    bfloat16_by_float16: bool | None = None

    # New tokens. For fewer, weights in float16 are not packed for bfloat16, because it takes as long as it saves in about
    # that many steps. It depends on what is asked for, not on what is packed already, so that equal calls give equal texts.
    tokens_by_float16: int = 64

    # Whether fewer are asked for: see `for_tokens`.
    few_tokens: bool = False

    # Steps of several rows before the weights are packed: packing takes as long as it saves in that many.
    steps_before_packing: int = 24

    # Rows. More are multiplied as fast without packing.
    packed_rows: int = 256

    # Rows. Prompts that begin at once and have no more tokens in all are computed together, because a product of 256 rows
    # takes only twice as long as one of 64.
    prompt_rows_together: int = 256

    # Rows. A text with at most this many tokens to compute begins in a step of other texts, without a pass of its own.
    rows_to_join: int = 64

    # Whether the CPU multiplies matrices of bfloat16 and int8 faster than those of float32. None: `device` detects it.
    matrix_units: bool | None = None

    # Rows. From here on, a CPU without instructions for bfloat16 multiplies faster in float32, including the conversion.
    rows_for_float32: int = 256

    # Rows. From here on, oneDNN applies the activation after a layer in bfloat16, which takes a third of the time of torch's
    # operation. Steps with drafts have fewer rows, because each must have the bits of a single one.
    rows_to_activate: int = 64

    # Rows. From here on, torch's product is faster than fbgemm's on a CPU with instructions for float16.
    rows_for_own_float16: int = 128

    # Rows. From here on, Python runs the blocks: its share of the time is negligible, and Ctrl-C takes effect before all
    # blocks have run.
    rows_for_python: int = 64

    # Rows. Shorter prompts do not use matrix units for int8; packing the weights breaks even at about 500 rows.
    matrix_prompt_rows: int = 128

    # Rows. Decode steps of fewer rows do not use matrix units for int8.
    matrix_step_rows: int = 24

    # Rows per product. Intermediate results of this many rows stay in the processor's cache.
    matrix_rows_at_once: int = 240

    # Seconds for which several greedy tokens are computed before control returns; too short to be noticed.
    seconds_at_once: float = 0.02

    # The largest number of tokens in that time.
    max_at_once: int = 16

    # Returns the time in seconds.
    clock: Callable[[], float] = time.perf_counter

    # The additional time of a step with drafts, in plain steps: a constant part, and a part per draft. None: see `costs`.
    costs_of_drafts: tuple[float, float] | None = None

    greedy_head: GreedyHeadLimits = GREEDY_HEAD
    graphs: GraphLimits = GRAPHS

    def for_tokens(self, n_tokens: int) -> FastLimits:
        """Return the limits for a text of up to `n_tokens` new tokens."""
        return dataclasses.replace(self, few_tokens=n_tokens < self.tokens_by_float16)


FAST = FastLimits()

# The model itself, without any fast path: the same tokens, slower.
NOTHING_FAST = FastLimits(use_plan=False)
