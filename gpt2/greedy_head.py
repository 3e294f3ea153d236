"""GreedyHead: the logits that can be the largest, without reading all of the head's weights.

The head is a third of what a decode step of the 124M model reads, and all that a greedy step wants of it is which logit is
the largest. The weights rounded to bytes tell each logit to within a bound, and only the rows that may hold the largest by
that bound are multiplied in full: a dozen of 50,257. The bound is Cauchy and Schwarz's, |dw . h| <= |dw| |h|. It holds for
any weights and inputs, so the tokens are those that all logits would give; a model whose bounds are too wide is left alone.
In float32 a step of 124M takes a sixth to a fifth less.

It knows the head's weights and the hidden states, and nothing of the model or of how tokens are chosen.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.model import TokenEmbedding
from gpt2.packed_linear import state_of
from gpt2.quantization import LIFT, Int8Linear, quantized_rows
from gpt2.scripted import Scripted

# Smaller heads stay in the processor's cache, where there is nothing to save.
_MIN_BYTES = 2**25

# By dtype: after how many steps the bytes are made, and for how many rows of a batch they save anything. To make them takes
# as long as they save in so many steps: whoever generates less pays nothing, whoever generates more at most twice.
_PAYS = {torch.float32: (64, 16), torch.float16: (64, 16), torch.bfloat16: (240, 1)}

# If more of the vocabulary than this must be multiplied in full, nothing is saved.
_MAX_PART = 1 / 32

# So often there may be more before a generation goes on without.
_MAX_MISSES = 3

# Parts of this many rows are packed in two thirds of the time.
_ROWS_OF_PART = 6400

# For another number of rows than a multiple of this, MKL sums in another order than for the whole head.
_ROWS_OF_KERNEL = 16


@dataclass
class _Bytes:
    """The weights (V, C) in bytes, with what they leave out."""

    state: object  # of the weights they were made of
    packed: list[Any]  # for the kernel, in parts
    radius: Tensor  # (V,) float32: the length of each row's rounding errors
    largest_radius: float
    longest: float  # the length of the longest row of bytes times scale


@dataclass
class _Record:
    """What is kept of a head from one generation to the next."""

    n_steps: int = 0
    bytes: _Bytes | None = None


_records: weakref.WeakKeyDictionary[nn.Module, _Record] = weakref.WeakKeyDictionary()


class GreedyHead:
    """`logits` of the first `vocab_size` tokens of a head. Make one for each generation."""

    def __init__(self, head: TokenEmbedding, vocab_size: int | None = None) -> None:
        self._weight = head.weight.detach()[:vocab_size]
        self._record = _records.setdefault(head, _Record())
        self._bytes: _Bytes | None = None
        self._misses = 0

    @staticmethod
    def fits(head: nn.Module) -> bool:
        """Whether there is something to save, and an operator for it: it is private to torch."""
        return (
            type(head) is TokenEmbedding
            and head.weight.device.type == "cpu"
            and head.weight.dtype in _PAYS
            and head.weight.nbytes >= _MIN_BYTES
            and not head.weight.is_inference()  # it has no version, by which a change would be noticed
            and hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
        )

    def logits(self, hidden_states: Tensor) -> Tensor | None:
        """(B, V) of (B, C): the head's where they can be the largest of a row, -inf elsewhere. None: compute them all."""
        n_steps, max_rows = _PAYS[self._weight.dtype]
        if len(hidden_states) > max_rows or self._misses == _MAX_MISSES:
            return None
        self._record.n_steps += 1
        if self._record.n_steps <= n_steps:
            return None
        self._bytes = self._bytes or self._made()
        if self._bytes is None:
            self._misses = _MAX_MISSES
            return None
        tokens = self._candidates(hidden_states, self._bytes)
        if tokens is None:
            self._misses += 1
            return None
        n = len(tokens)
        weight = self._weight[F.pad(tokens, (0, -n % _ROWS_OF_KERNEL))]
        logits = torch.full((len(hidden_states), len(self._weight)), -math.inf, dtype=hidden_states.dtype)
        logits[:, tokens] = F.linear(hidden_states, weight)[:, :n]
        return logits

    def _made(self) -> _Bytes | None:
        """The bytes, kept or new. None if the weights are damaged, or the kernel is missing."""
        state = (len(self._weight), state_of(self._weight))
        if self._record.bytes is None or self._record.bytes.state != state:
            self._record.bytes = None  # the old ones go before the new ones come
            packed, radius, longest = [], [], 0.0
            for part in self._weight.split(_ROWS_OF_PART):
                weight_int8, scale = quantized_rows(part.float())
                rounded = weight_int8 * scale[:, None]
                radius.append(torch.linalg.vector_norm(part - rounded, dim=1))
                longest = max(longest, float(torch.linalg.vector_norm(rounded, dim=1).max()))
                packed.append(Int8Linear(weight_int8, scale, None).packed_weight())
            all_radius = torch.cat(radius)
            if not math.isfinite(longest + float(all_radius.sum())) or any(pack is None for pack in packed):
                return None
            packed = _scripted_candidates.list_of(packed)
            self._record.bytes = _Bytes(state, packed, all_radius, float(all_radius.max()), longest)
        return self._record.bytes

    def _candidates(self, hidden_states: Tensor, weight: _Bytes) -> Tensor | None:
        """As the function below, or None if they are too many."""
        eps = torch.finfo(hidden_states.dtype).eps
        tokens = _scripted_candidates(
            hidden_states.float(), weight.packed, weight.radius, weight.largest_radius, weight.longest, eps
        )
        return tokens if len(tokens) <= _MAX_PART * len(self._weight) else None


def candidates(
    x: Tensor,
    packed: list[torch.classes.quantized.LinearPackedParamsBase],  # type: ignore[name-defined]
    radius: Tensor,
    largest_radius: float,
    longest: float,
    eps: float,
    lift: float = LIFT,  # a default, for TorchScript sees no other globals
) -> Tensor:
    """The tokens (N,), in order, whose logit can be the largest of a row of `x` (B, C) float32: all, if a row is 0 or NaN.

    The weights are as in `_Bytes`; `eps` is the relative error of the logits' dtype. Each row of `x` is brought to steps
    from -63 to 63: bytes times bytes then stay in the 16 bits in which old processors add pairs of them. A second digit, of
    base 126, holds what the steps leave out, and the kernel rounds it by half at most.
    """
    B, C = x.size(0), x.size(1)
    x = x * (63 / x.abs().amax(1, keepdim=True))
    steps = x.round()
    digits = torch.cat([steps, (x - steps) * 126])
    about = torch.empty([B, radius.size(0)])
    done = 0
    for part in packed:
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(digits, 1.0, 64, part)
        torch.add(y[:B], y[B:], alpha=1 / 126, out=about[:, done : done + y.size(1)])
        done += y.size(1)
    about *= lift  # by which the packed scales are lowered

    # How far a logit can be from this: by the rounding of weights and inputs, of sums in float32, and of the result.
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    of_sums = longest * (C**0.5 / 252 + 2 * C * 1.2e-7 * length)
    top = about.amax(1, keepdim=True)
    slack = of_sums + eps * (top.abs() + 2 * (largest_radius * length + of_sums))
    # First with one bound for all, then for those few with their own. A comparison with NaN excludes nothing.
    tokens = (about < top - 2 * (largest_radius * length + slack)).logical_not_().nonzero()[:, 1]
    if B > 1:
        tokens = tokens.unique()
    about = about[:, tokens]
    bound = radius[tokens] * length + slack
    return tokens[~(about + bound < (about - bound).amax(1, keepdim=True)).all(0)]


_scripted_candidates = Scripted(candidates)
