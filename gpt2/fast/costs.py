"""Relative costs of decode steps, as constants. Speculation decides by them whether drafts gain time, the same in every run.

They were measured with gpt2-tiny and 124M on a CPU. Ids do not depend on them. The module depends on sizes and dtypes only.
"""

from __future__ import annotations

import torch

from gpt2.device import has_matrix_units
from gpt2.fast.cuda_graph import GraphedSteps
from gpt2.fast.limits import FAST, FastLimits
from gpt2.fast.plan import PlanOfEach
from gpt2.model import GPT2
from gpt2.quantization.quantize import is_int8


def costs_of_verifying(model: GPT2, network: object, limits: FastLimits = FAST) -> tuple[float, float]:
    """Return the additional time of a step with drafts: (constant part, part per draft), in plain decode steps of `model`.

    `network` verifies the drafts: the result of `DecodePlan.for_drafts`, or the model itself. The figures were measured with
    gpt2-tiny and 124M on a CPU, and rounded up:

    - A step with drafts goes through Python, which takes as long as reading 4 MB. Several greedy tokens in one call do not.
    - Calling the operations of one block takes as long as reading 2 MB.
    - In int8, a `PlanOfEach` calls twice as many operations, and 20% more per draft.
    - In 16 bits, it calls 50% more per draft, and reads the weights again from the processor's cache. bfloat16 with matrix
      units is an exception.
    - On a GPU the figures are estimated, not measured. Kernels are launched one by one, and not replayed (`cuda_graph`).
    """
    if limits.costs_of_drafts is not None:
        return limits.costs_of_drafts
    if GraphedSteps.fits(model, limits.graphs):
        return 4.0, 0.1
    n_bytes = sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
    calls = 2e6 * model.config.n_layer
    python, share = 4e6 / (calls + n_bytes), calls / (calls + n_bytes)
    each_alone = isinstance(network, PlanOfEach)
    if each_alone and is_int8(model):
        return 2 * share + python, 0.11 + 0.21 * share
    if each_alone and not (model.dtype == torch.bfloat16 and has_matrix_units()):
        return 0.1 + python, 0.46 + 0.57 * share
    return 0.4 + python, 0.11


def relative_cost(draft_model: GPT2, model: GPT2) -> float:
    """Return the time of a decode step of `draft_model`, in decode steps of `model`.

    It is the mean of two ratios: bytes of the weights, and number of layers.
    """
    n_bytes = [sum(weight.nbytes for weight in (*m.parameters(), *m.buffers())) for m in (draft_model, model)]
    return (n_bytes[0] / n_bytes[1] + draft_model.config.n_layer / model.config.n_layer) / 2
