"""GreedyHead: the logits that can be the largest, without reading all weights of the head.

The head is a third of the bytes that a decode step of the 124M model reads, and a greedy step needs only the index of the
largest logit. Weights rounded to int8 give each logit within an error bound. Only the tokens that can have the largest logit
by that bound are computed with the full weights: about 12 of 50,257. The bound is the Cauchy-Schwarz inequality,
|dw . h| <= |dw| |h|. It holds for any weights and inputs, so the tokens are those of all logits, unless two logits differ
only by rounding, which depends on the number of rows of a product. If the bounds of a model are too wide, all logits are
computed. In float32, a step of 124M takes 12-20% less time.

It depends on the head's weights and on hidden states, not on the model or on sampling.
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

# The balance is the number of steps with a gain minus the number of steps without one.
# At this balance, in steps, a head is no longer used.
_LEAST_BALANCE = -3

# The balance does not rise above this many steps.
_MOST_BALANCE = 30

# Rows. If their number is not a multiple of this, MKL adds in an order that differs from its order for the full head.
_ROWS_OF_KERNEL = 16

# Euclidean length of the longest row of weights. Outside these limits the bounds do not hold in float32.
_LEAST_LENGTH, _MOST_LENGTH = 1e-9, 1e9


@dataclass
class _Experience:
    """What is kept about a head between generations, besides its int8 weights."""

    n_steps: int = 0  # since the weights have last changed
    balance: int = 0  # steps with a gain minus steps without one


_experiences: weakref.WeakKeyDictionary[nn.Module, _Experience] = weakref.WeakKeyDictionary()
_bytes: Derived[HeadBytes | None] = Derived()  # None: the bounds do not hold for these weights


class GreedyHead:
    """Computes the `logits` of the first `vocab_size` tokens that can be the largest. Make one for each generation."""

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
        """Return whether a greedy head can save time for this head, and torch has the operator that it needs."""
        return (
            type(head) is TokenEmbedding
            and head.weight.device.type == "cpu"
            and head.weight.dtype in limits.pays
            and head.weight.nbytes >= limits.min_bytes
            and not head.weight.is_inference()  # an inference tensor has no version, so changes could not be detected
            and multiplies_given_steps(limits.engines)
        )

    def logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits (B, V) of hidden states (B, C), or None if the caller must compute all logits.

        A logit that cannot be the largest of a row is -inf.
        """
        known = self._experience
        if len(hidden_states) > self._max_rows or known.balance == _LEAST_BALANCE or torch.is_autocast_enabled("cpu"):
            return None
        if self._weight._version != self._version:  # the weights were changed during this generation
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
        """Return how many of the next `n_steps` steps of one row need all logits, and count these steps as done."""
        known = self._experience
        if known.balance > _LEAST_BALANCE:
            n_steps = max(0, min(n_steps, self._wait - known.n_steps))
        known.n_steps += n_steps
        return n_steps

    def _kept_or_made(self) -> HeadBytes | None:
        """Return the int8 weights, or None if the weights have changed, which restarts the wait, or are damaged."""
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
        packed += Int8Linear(weight_int8, scale, None).packed_weight() or []
        small_parts = (tensor.split(ROWS_IN_CACHE) for tensor in (part, weight_int8, scale))
        for exact, in_steps, size in zip(*small_parts, strict=True):
            rounded = in_steps * size[:, None]
            radius.append(torch.linalg.vector_norm(exact - rounded, dim=1))
            longest = max(longest, float(torch.linalg.vector_norm(rounded, dim=1).max()))
    all_radius = torch.cat(radius)
    # The weights are damaged, or their squares exceed the range of float32.
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
    """Return the tokens, int64 (N,) in ascending order, whose logit can be the largest of a row of `x` (B, C) float32.

    If a row is 0 or contains NaN, these are all tokens. Each row of `x` is scaled to steps from -63 to 63, so that pairs of
    int8 products, which old processors add in 16 bits, do not overflow. The remainder is a second digit, in units of 1/126
    step, which the kernel rounds by at most half a unit.
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

    # Error bounds of these logits: rounding of weights and inputs, of sums in float32, and of the result.
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    of_sums = head.longest * (C**0.5 / 252 + 2 * C * 1.2e-7 * length)
    top = about.amax(1, keepdim=True)
    largest = head.largest_radius * length
    slack = of_sums + head.eps * (top.abs() + 2 * (largest + of_sums) + head.smallest / rounding.LIFT * unit)
    # Filter with one bound for all tokens, then the remaining few with their own. A comparison with NaN keeps a token.
    tokens = (about < top - 2 * (largest + slack)).logical_not_().nonzero()[:, 1]
    if B > 1:
        tokens = torch.unique(tokens)  # sorted; TorchScript does not know Tensor.unique
    about = about[:, tokens]
    bound = head.radius[tokens] * length + slack
    kept: Tensor = tokens[~(about + bound < (about - bound).amax(1, keepdim=True)).all(0)]
    return kept


scripted_candidates = Scripted(candidates)
