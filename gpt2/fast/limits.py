"""FastLimits: from where on each fast path is taken, as one value that is handed down. It computes nothing.

The defaults are what was measured to pay on a CPU. Tests hand in others, so that small models go the ways of large ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from gpt2.quantization.kernels import ENGINES

# (step, device) -> what replays the step.
Recorder = Callable[[Callable[[], None], torch.device], Callable[[], object]]


@dataclass(frozen=True)
class GreedyHeadLimits:
    """When a `GreedyHead` pays."""

    # Smaller heads stay in the processor's cache, where there is nothing to save.
    min_bytes: int = 2**25

    # For fewer new tokens than this, it takes what is saved to see whether the weights have changed.
    min_steps: int = 16

    # By dtype: after how many steps the bytes are made, and for how many rows of a batch they save anything. To make them
    # takes as long as they save in that many steps: a shorter text pays nothing, a longer one at most twice.
    pays: Mapping[torch.dtype, tuple[int, int]] = field(
        default_factory=lambda: {torch.float32: (112, 16), torch.float16: (112, 16), torch.bfloat16: (640, 1)}
    )

    # If more of the vocabulary than this must be multiplied in full, nothing is saved.
    max_part: float = 1 / 32

    # Smaller parts are packed sooner, and multiplied later.
    rows_of_part: int = 25600

    # torch's kernels for bytes that may be used.
    engines: Sequence[str] = ENGINES


GREEDY_HEAD = GreedyHeadLimits()


@dataclass(frozen=True)
class GraphLimits:
    """When steps are recorded as CUDA graphs. Estimated; not measured on a GPU."""

    # A graph is recorded after this many steps of the same rows (beams change rows at each), and if this many are left:
    # recording takes about as long as five steps without a graph.
    steps_before: int = 2
    steps_left: int = 16

    # It has its slots up to a multiple of this, where another follows: attention pays for those that hold no token yet.
    slots_at_once: int = 256

    # What records a step, for any device; None: `cuda_graph.captured`, for CUDA.
    recorder: Recorder | None = None


GRAPHS = GraphLimits()


@dataclass(frozen=True)
class FastLimits:
    """What may be used of this folder, and from how many rows on."""

    # False: the model itself computes each step.
    use_plan: bool = True

    # False: Python runs the functions that TorchScript runs otherwise.
    use_torchscript: bool = True

    # False: bfloat16 is multiplied as the model does it.
    pack_bfloat16: bool = True

    # Whether the CPU multiplies matrices of bfloat16 and bytes faster than of float32; None: what `device` finds.
    matrix_units: bool | None = None

    # From this many rows on, a CPU without matrix units multiplies bfloat16 faster in float32, conversion included.
    rows_for_float32: int = 256

    # This many rows are computed for so long that Python does not matter, and Ctrl-C is not to wait for all blocks.
    rows_for_python: int = 64

    # Prompts of fewer rows do not use matrix units for int8: arranging the weights breaks even at about 500 rows.
    matrix_prompt_rows: int = 128
    # Decode steps of fewer rows do not either.
    matrix_step_rows: int = 24

    # What lies between two products of this many rows stays in the processor's cache.
    matrix_rows_at_once: int = 240

    # Greedy tokens are computed for this long, and at most this many, before control returns: too short to notice.
    seconds_at_once: float = 0.02
    max_at_once: int = 16
    clock: Callable[[], float] = time.perf_counter  # in seconds

    # What a step with drafts costs, in plain steps: with any, and for each draft. None: `costs` has the figures.
    costs_of_drafts: tuple[float, float] | None = None

    greedy_head: GreedyHeadLimits = GREEDY_HEAD
    graphs: GraphLimits = GRAPHS


FAST = FastLimits()

# The model alone, without any of it: the same tokens, more slowly.
NOTHING_FAST = FastLimits(use_plan=False)
