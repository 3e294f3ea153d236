"""GreedyHead: the logits that can be the largest, without reading all of the head's weights.

The head is a third of what a decode step of the 124M model reads, and all that a greedy step wants of it is which logit is
the largest. The weights rounded to bytes tell each logit to within a bound, and only the rows that may hold the largest by
that bound are multiplied in full: a dozen of 50,257. The bound is Cauchy and Schwarz's, |dw . h| <= |dw| |h|. It holds for
any weights and inputs, so the tokens are those that all logits would give, unless two agree to the last digits, which depend
on how many rows a product has. A model whose bounds are too wide is left alone. In float32 a step of 124M takes an eighth to
a fifth less.

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

from gpt2.fast.linear import state_of
from gpt2.fast.scripted import Scripted
from gpt2.model import TokenEmbedding
from gpt2.quantization.kernels import LIFT, ROWS_IN_CACHE, multiplies_given_steps, quantized_rows
from gpt2.quantization.layers import Int8Linear

# Smaller heads stay in the processor's cache, where there is nothing to save.
_MIN_BYTES = 2**25

# By dtype: after how many steps the bytes are made, and for how many rows of a batch they save anything. To make them takes
# as long as they save in so many steps: whoever generates less pays nothing, whoever generates more at most twice.
_PAYS = {torch.float32: (112, 16), torch.float16: (112, 16), torch.bfloat16: (640, 1)}

# For fewer new tokens than this, it takes what is saved to see whether the weights have changed.
MIN_STEPS = 16

# If more of the vocabulary than this must be multiplied in full, nothing is saved.
_MAX_PART = 1 / 32

# Steps that were saved less those in vain: a head that comes down to the first is left alone, and none earns more than the
# second.
_LEAST_BALANCE, _MOST_BALANCE = -3, 30

# Smaller parts are packed sooner, and multiplied later.
_ROWS_OF_PART = 25600

# For another number of rows than a multiple of this, MKL sums in another order than for all but the last rows of the head.
_ROWS_OF_KERNEL = 16

# Of the longest row of weights.
_LEAST_LENGTH, _MOST_LENGTH = 1e-9, 1e9


@dataclass
class _Bytes:
    """The weights (V, C) in bytes, with what they leave out. Packed scales are lowered by LIFT, so all lengths are, too."""

    state: object  # of the weights they were made of
    packed: list[Any]  # for the kernel, in parts
    radius: Tensor  # (V,) float32: the length of each row's rounding errors
    largest_radius: float
    longest: float  # the length of the longest row of bytes times scale


@dataclass
class _Record:
    """What is kept of a head from one generation to the next."""

    n_steps: int = 0  # since the weights are as they are
    balance: int = 0
    bytes: _Bytes | None = None


_records: weakref.WeakKeyDictionary[nn.Module, _Record] = weakref.WeakKeyDictionary()


class GreedyHead:
    """`logits` of the first `vocab_size` tokens of a head. Make one for each generation."""

    def __init__(self, head: TokenEmbedding, vocab_size: int | None = None) -> None:
        self._weight = head.weight.detach()
        self._version = head.weight._version
        self._vocab_size = len(self._weight[:vocab_size])
        self._record = _records.setdefault(head, _Record())
        self._bytes: _Bytes | None = None

    @staticmethod
    def fits(head: nn.Module) -> bool:
        """Whether there is something to save, and an operator for it."""
        return (
            type(head) is TokenEmbedding
            and head.weight.device.type == "cpu"
            and head.weight.dtype in _PAYS
            and head.weight.nbytes >= _MIN_BYTES
            and not head.weight.is_inference()  # it has no version, by which a change would be noticed
            and multiplies_given_steps()
        )

    def logits(self, hidden_states: Tensor) -> Tensor | None:
        """(B, V) of (B, C): the head's where they can be the largest of a row, -inf elsewhere. None: compute them all."""
        record, (wait, max_rows) = self._record, _PAYS[self._weight.dtype]
        if len(hidden_states) > max_rows or record.balance == _LEAST_BALANCE or torch.is_autocast_enabled("cpu"):
            return None
        if self._weight._version != self._version:  # it was changed in the middle of a text
            return None
        record.n_steps += 1
        if record.n_steps <= wait:
            return None
        weight = self._bytes = self._bytes or self._kept_or_made()
        if weight is None:
            return None
        tokens = _scripted_candidates(
            *(hidden_states.float(), weight.packed, weight.radius, weight.largest_radius, weight.longest),
            *(self._vocab_size, torch.finfo(hidden_states.dtype).eps, torch.finfo(hidden_states.dtype).smallest_normal),
        )
        if len(tokens) > _MAX_PART * self._vocab_size:
            record.balance -= 1
            return None
        record.balance = min(record.balance + 1, _MOST_BALANCE)
        n = len(tokens)
        rows = self._weight[F.pad(tokens, (0, -n % _ROWS_OF_KERNEL))]
        logits = torch.full((len(hidden_states), self._vocab_size), -math.inf, dtype=hidden_states.dtype)
        logits[:, tokens] = F.linear(hidden_states, rows)[:, :n]
        return logits

    def leave_alone(self, n_steps: int) -> int:
        """How many of the next steps of one row need all logits anyway, at most `n_steps`. They count as made."""
        record = self._record
        if record.balance > _LEAST_BALANCE:
            n_steps = max(0, min(n_steps, _PAYS[self._weight.dtype][0] - record.n_steps))
        record.n_steps += n_steps
        return n_steps

    def _kept_or_made(self) -> _Bytes | None:
        """None if the weights have changed, for then the wait begins anew, or if they are damaged."""
        record, state = self._record, state_of(self._weight)
        if record.bytes is not None and record.bytes.state != state:
            record.n_steps, record.balance, record.bytes = 1, 0, None
            return None
        made = record.bytes = record.bytes or _made(self._weight, state)
        if made is None:
            record.balance = _LEAST_BALANCE
        return made


def _made(weight: Tensor, state: object) -> _Bytes | None:
    packed, radius, longest = [], [], 0.0
    for part in weight.split(_ROWS_OF_PART):
        weight_int8, scale = quantized_rows(part)
        packed.append(Int8Linear(weight_int8, scale, None).packed_weight())
        small_parts = (tensor.split(ROWS_IN_CACHE) for tensor in (part, weight_int8, scale))
        for exact, steps, size in zip(*small_parts, strict=True):
            rounded = steps * size[:, None]
            radius.append(torch.linalg.vector_norm(exact - rounded, dim=1))
            longest = max(longest, float(torch.linalg.vector_norm(rounded, dim=1).max()))
    all_radius = torch.cat(radius)
    # Damaged weights, and such whose squares float32 does not hold.
    if not (_LEAST_LENGTH < longest < _MOST_LENGTH and bool(torch.isfinite(all_radius).all())):
        return None
    all_radius /= LIFT
    return _Bytes(state, _scripted_candidates.list_of(packed), all_radius, float(all_radius.max()), longest / LIFT)


def candidates(
    x: Tensor,
    packed: list[torch.classes.quantized.LinearPackedParamsBase],  # type: ignore[name-defined]
    radius: Tensor,
    largest_radius: float,
    longest: float,
    vocab_size: int,
    eps: float,
    smallest: float,
    lift: float = LIFT,  # a default, for TorchScript sees no other globals
) -> Tensor:
    """The tokens (N,), in order, whose logit can be the largest of a row of `x` (B, C) float32: all, if a row is 0 or NaN.

    The weights are as in `_Bytes`; in the dtype of the logits, `eps` is the relative error of numbers from `smallest` on.
    Each row of `x` is brought to steps from -63 to 63: bytes times bytes then stay in the 16 bits in which old processors
    add pairs of them. A second digit, of base 126, holds what the steps leave out; the kernel rounds it by half at most.
    """
    B, C = x.size(0), x.size(1)
    unit = 63 / x.abs().amax(1, keepdim=True)
    x = x * unit
    steps = x.round()
    digits = torch.cat([steps, (x - steps) * 126])
    about = torch.empty([B, radius.size(0)], dtype=torch.float32)
    done = 0
    for part in packed:
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(digits, 1.0, 64, part)
        torch.add(y[:B], y[B:], alpha=1 / 126, out=about[:, done : done + y.size(1)])
        done += y.size(1)
    about = about[:, :vocab_size]

    # How far a logit can be from this: by the rounding of weights and inputs, of sums in float32, and of the result.
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    of_sums = longest * (C**0.5 / 252 + 2 * C * 1.2e-7 * length)
    top = about.amax(1, keepdim=True)
    slack = of_sums + eps * (top.abs() + 2 * (largest_radius * length + of_sums) + smallest / lift * unit)
    # First with one bound for all, then for those few with their own. A comparison with NaN excludes nothing.
    tokens = (about < top - 2 * (largest_radius * length + slack)).logical_not_().nonzero()[:, 1]
    if B > 1:
        tokens = tokens.unique()
    about = about[:, tokens]
    bound = radius[tokens] * length + slack
    return tokens[~(about + bound < (about - bound).amax(1, keepdim=True)).all(0)]


_scripted_candidates = Scripted(candidates)
