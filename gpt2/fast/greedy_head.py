"""GreedyHead: the logits that can be the largest, without reading all of the head's weights.

The head is a third of what a decode step of the 124M model reads, and all that a greedy step wants of it is which logit is
the largest. The weights rounded to bytes tell each logit to within a bound, and only the rows that may hold the largest by
that bound are multiplied in full: a dozen of 50,257. The bound is Cauchy and Schwarz's, |dw . h| <= |dw| |h|. It holds for
any weights and inputs, so the tokens are those that all logits would give, unless two agree to the last digits, which depend
on how many rows a product has. A model whose bounds are too wide is left alone. In float32 a step of 124M takes
12-20% less.

It knows the head's weights and the hidden states, and nothing of the model or of how tokens are chosen.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.fast.head_bytes import HeadBytes
from gpt2.fast.limits import GREEDY_HEAD, GreedyHeadLimits
from gpt2.fast.scripted import Scripted
from gpt2.model import TokenEmbedding
from gpt2.quantization import rounding
from gpt2.quantization.derived import Derived, state_with_contents
from gpt2.quantization.kernels import ROWS_IN_CACHE, multiplies_given_steps, quantized_rows
from gpt2.quantization.layers import Int8Linear

# Steps that were saved less those in vain: a head that comes down to the first is left alone, and none earns more than the
# second.
_LEAST_BALANCE, _MOST_BALANCE = -3, 30

# For another number of rows than a multiple of this, MKL sums in another order than for all but the last rows of the head.
_ROWS_OF_KERNEL = 16

# Of the longest row of weights.
_LEAST_LENGTH, _MOST_LENGTH = 1e-9, 1e9


@dataclass
class _Experience:
    """What is known of a head from one generation to the next, besides its bytes."""

    n_steps: int = 0  # since the weights are as they are
    balance: int = 0


_experiences: weakref.WeakKeyDictionary[nn.Module, _Experience] = weakref.WeakKeyDictionary()
_bytes: Derived[HeadBytes | None] = Derived()  # None for weights that bounds do not hold for


class GreedyHead:
    """`logits` of the first `vocab_size` tokens of a head. Make one for each generation."""

    def __init__(self, head: TokenEmbedding, vocab_size: int | None = None, limits: GreedyHeadLimits = GREEDY_HEAD) -> None:
        self._head, self._weight = head, head.weight.detach()
        self._version = head.weight._version
        self._vocab_size = len(self._weight[:vocab_size])
        self._wait, self._max_rows = limits.pays[self._weight.dtype]
        self._max_tokens, self._rows_of_part = limits.max_part * self._vocab_size, limits.rows_of_part
        self._experience = _experiences.setdefault(head, _Experience())
        self._own_bytes: HeadBytes | None = None

    @staticmethod
    def fits(head: nn.Module, limits: GreedyHeadLimits = GREEDY_HEAD) -> bool:
        """Whether there is something to save, and an operator for it."""
        return (
            type(head) is TokenEmbedding
            and head.weight.device.type == "cpu"
            and head.weight.dtype in limits.pays
            and head.weight.nbytes >= limits.min_bytes
            and not head.weight.is_inference()  # it has no version, by which a change would be noticed
            and multiplies_given_steps(limits.engines)
        )

    def logits(self, hidden_states: Tensor) -> Tensor | None:
        """(B, V) of (B, C): the head's where they can be the largest of a row, -inf elsewhere. None: compute them all."""
        known = self._experience
        if len(hidden_states) > self._max_rows or known.balance == _LEAST_BALANCE or torch.is_autocast_enabled("cpu"):
            return None
        if self._weight._version != self._version:  # it was changed in the middle of a text
            return None
        known.n_steps += 1
        if known.n_steps <= self._wait:
            return None
        weight = self._own_bytes = self._own_bytes or self._kept_or_made()
        if weight is None:
            return None
        tokens: Tensor = scripted_candidates(hidden_states.float(), weight, self._vocab_size)
        if len(tokens) > self._max_tokens:
            known.balance -= 1
            return None
        known.balance = min(known.balance + 1, _MOST_BALANCE)
        n = len(tokens)
        rows = self._weight[F.pad(tokens, (0, -n % _ROWS_OF_KERNEL))]
        logits = torch.full((len(hidden_states), self._vocab_size), -math.inf, dtype=hidden_states.dtype)
        logits[:, tokens] = F.linear(hidden_states, rows)[:, :n]
        return logits

    def leave_alone(self, n_steps: int) -> int:
        """How many of the next steps of one row need all logits anyway, at most `n_steps`. They count as made."""
        known = self._experience
        if known.balance > _LEAST_BALANCE:
            n_steps = max(0, min(n_steps, self._wait - known.n_steps))
        known.n_steps += n_steps
        return n_steps

    def _kept_or_made(self) -> HeadBytes | None:
        """None if the weights have changed, for then the wait begins again, or if they are damaged."""
        known, state = self._experience, state_with_contents(self._weight)
        if self._head in _bytes and _bytes.state(self._head) != state:
            known.n_steps, known.balance = 1, 0
            _bytes.forget(self._head)
            return None
        made = _bytes.of(self._head, state, self._make)
        if made is None:
            known.balance = _LEAST_BALANCE
        return made

    def _make(self) -> HeadBytes | None:
        return _made(self._weight, self._rows_of_part)


def _made(weight: Tensor, rows_of_part: int) -> HeadBytes | None:
    packed, radius, longest = [], [], 0.0
    for part in weight.split(rows_of_part):
        weight_int8, scale = quantized_rows(part)
        packed.append(Int8Linear(weight_int8, scale, None).packed_weight())
        small_parts = (tensor.split(ROWS_IN_CACHE) for tensor in (part, weight_int8, scale))
        for exact, in_steps, size in zip(*small_parts, strict=True):
            rounded = in_steps * size[:, None]
            radius.append(torch.linalg.vector_norm(exact - rounded, dim=1))
            longest = max(longest, float(torch.linalg.vector_norm(rounded, dim=1).max()))
    all_radius = torch.cat(radius)
    # Damaged weights, and such whose squares float32 does not hold.
    if not (_LEAST_LENGTH < longest < _MOST_LENGTH and bool(torch.isfinite(all_radius).all())):
        return None
    all_radius /= rounding.LIFT
    of_logits = torch.finfo(weight.dtype)
    return HeadBytes(
        scripted_candidates.list_of(packed),
        all_radius,
        float(all_radius.max()),
        longest / rounding.LIFT,
        of_logits.eps,
        of_logits.smallest_normal,
    )


def candidates(x: Tensor, head: HeadBytes, vocab_size: int) -> Tensor:
    """The tokens (N,), in order, whose logit can be the largest of a row of `x` (B, C) float32: all, if a row is 0 or NaN.

    Each row of `x` is brought to steps from -63 to 63: bytes times bytes then stay in the 16 bits in which old processors
    add pairs of them. A second digit, of base 126, holds what the steps leave out; the kernel rounds it by half at most.
    """
    B, C = x.size(0), x.size(1)
    unit = 63 / x.abs().amax(1, keepdim=True)
    x = x * unit
    whole = x.round()
    digits = torch.cat([whole, (x - whole) * 126])
    about = torch.empty([B, head.radius.size(0)], dtype=torch.float32)
    done = 0
    for part in head.packed:
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(digits, 1.0, 64, part)
        torch.add(y[:B], y[B:], alpha=1 / 126, out=about[:, done : done + y.size(1)])
        done += y.size(1)
    about = about[:, :vocab_size]

    # How far a logit can be from this: by the rounding of weights and inputs, of sums in float32, and of the result.
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    of_sums = head.longest * (C**0.5 / 252 + 2 * C * 1.2e-7 * length)
    top = about.amax(1, keepdim=True)
    largest = head.largest_radius * length
    slack = of_sums + head.eps * (top.abs() + 2 * (largest + of_sums) + head.smallest / rounding.LIFT * unit)
    # First with one bound for all, then for those few with their own. A comparison with NaN excludes nothing.
    tokens = (about < top - 2 * (largest + slack)).logical_not_().nonzero()[:, 1]
    if B > 1:
        tokens = torch.unique(tokens)  # sorted; the method is unknown to TorchScript
    about = about[:, tokens]
    bound = head.radius[tokens] * length + slack
    kept: Tensor = tokens[~(about + bound < (about - bound).amax(1, keepdim=True)).all(0)]
    return kept


scripted_candidates = Scripted(candidates)
