"""How long steps take beside each other, as figures: whether drafts pay is decided by them, the same in every run.

They were measured with gpt2-tiny and 124M on a CPU. Ids do not depend on them.
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
    """How much longer a step with drafts takes, in plain steps of `model`: with any, and for each of them.

    `network` verifies them: what `DecodePlan.for_drafts` gives, or the model itself. Measured with gpt2-tiny and 124M on a
    CPU, rounded up. It goes through Python, which several greedy steps in a row do not, and which takes as long as to read
    4 MB. To call the operations of a block takes as long as to read 2 MB. In int8 a `PlanOfEach` calls twice as many, and a
    fifth more for each draft; in 16 bits, but for bfloat16 with matrix units, half of them for each draft, and it reads the
    weights again from the processor's cache. On a GPU it is estimated, not measured: kernels are launched one by one, and
    not replayed (`cuda_graph`).
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
    """A decode step of one in units of the other's: to read the weights counts half, and to call the layers half."""
    n_bytes = [sum(weight.nbytes for weight in (*m.parameters(), *m.buffers())) for m in (draft_model, model)]
    return (n_bytes[0] / n_bytes[1] + draft_model.config.n_layer / model.config.n_layer) / 2
