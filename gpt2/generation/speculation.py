"""Speculative decoding: drafts of the next tokens, and how many to verify. It works on ids and depends on no other module.

`Batch` verifies drafts. It runs the model once on the last token and the drafts, and chooses the token after each position
as it would without drafts: from the same logits, by the same random number. If the token equals the draft, the next
position's logits are those of the text, and `Batch` continues there. If not, it keeps the token and rejects the remaining
drafts. Drafts therefore do not change the tokens of a seed, except where the rounding of a larger matrix product decides
between nearly equal logits, as in any batch. On a CPU in 16 bits and int8 that rounding is coarse; there, each draft is
computed with exactly the rounding of a single step (`DecodePlan.for_drafts`).

Leviathan et al. 2023 ("Fast Inference from Transformers via Speculative Decoding") accept a draft with a probability that
preserves the distribution. Keeping the tokens themselves is a stronger guarantee. Prompt lookup is from Saxena 2023
("Prompt Lookup Decoding").
"""

from __future__ import annotations

import random
from typing import Protocol

# The highest grade of evidence for a draft; for prompt lookup, the length of the longest n-gram, in tokens.
MAX_EVIDENCE = 4

# Lengths of n-grams, in tokens. A single token that occurred before predicts too little.
_MATCHES = (MAX_EVIDENCE, 3, 2)

# Numbers of drafts in one step, in tokens.
_N_DRAFTS = (1, 2, 4, 8, 16)

# Credit that each step adds, in plain decode steps. It limits the mean cost of rejected drafts per step.
_SHARE_FOR_TRIALS = 0.01

# How far drafts with an expected gain may reduce the credit below 0, in plain decode steps.
_OVERDRAFT = 0.5

# Highest credit that is kept, in plain decode steps.
_MOST_CREDIT = 3.0


class Drafter(Protocol):
    """The interface of an object that makes drafts."""

    def evidence(self, ids: list[int]) -> int:
        """Return the evidence for drafts after `ids`, from 1 to MAX_EVIDENCE, or 0 if no draft can be made."""

    def cost(self, n_drafts: int) -> float:
        """Return the cost of this number of drafts now, in decode steps of the model that verifies them."""

    def propose(self, ids: list[int], n_drafts: int, generator: random.Random) -> list[int]:
        """Return up to `n_drafts` tokens that may follow `ids`. `generator` belongs to the row and must not advance."""


class PromptLookup:
    """Drafts the tokens that followed an earlier occurrence of the last 2 to 4 tokens. The evidence is their number."""

    def __init__(self, n_positions: int) -> None:
        self._n_positions = n_positions
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> the index after its latest occurrence
        self._n_indexed = 0

    def evidence(self, ids: list[int]) -> int:
        """Return the length of the longest n-gram at the end of `ids` that also occurs earlier; 0 if there is none."""
        # Of a long prompt, index only the tokens that the model sees. Later tokens are indexed once each.
        for end in range(max(self._n_indexed, len(ids) - self._n_positions), len(ids)):
            for n in _MATCHES:
                if n <= end:
                    self._next[tuple(ids[end - n : end])] = end
        self._n_indexed = len(ids)
        return next((n for n in _MATCHES if tuple(ids[-n:]) in self._next), 0)

    def cost(self, n_drafts: int) -> float:
        """Return 0: the cost of a dictionary lookup is neglected."""
        return 0.0

    def propose(self, ids: list[int], n_drafts: int, generator: random.Random) -> list[int]:
        """Return the tokens after the longest match. If they reach the end of the text, they are repeated."""
        at = self._next[tuple(ids[-self.evidence(ids) :])]
        period = ids[at : at + n_drafts]
        return (period * (n_drafts // len(period) + 1))[:n_drafts]


class Speculation:
    """Decides for one row when to draft and how many tokens, from how often such drafts were accepted so far.

    `costs` is the additional time of a step with drafts: a constant part, and a part per draft. Their unit is the time of a
    plain decode step, and so is the unit of the credit. Each step adds a small share to the credit. A step with drafts
    subtracts its cost and adds the number of accepted drafts. While there is credit, drafts are tried even without an
    expected gain. A text that is hard to predict is therefore slowed down by about that share, and repetition is noticed
    soon.

    Costs are constants and not measured times, so that a seed gives the same steps in every run. Without drafts, several
    greedy tokens are computed in one step, so the next attempt to draft may come a few tokens later.
    """

    def __init__(self, drafter: Drafter, costs: tuple[float, float]) -> None:
        self._drafter = drafter
        self._costs = costs
        self._credit = 0.0
        self._evidence = 0
        # For each grade of evidence, the numbers of accepted and rejected drafts; older ones have less weight. The initial
        # values are the mean of ordinary texts.
        self._counts = {evidence: (2 + 0.8 * evidence, 6 - 0.8 * evidence) for evidence in range(1, MAX_EVIDENCE + 1)}

    def draft(self, ids: list[int], room: int, generator: random.Random) -> list[int]:
        """Return at most `room` drafts of the tokens after `ids`; often none. It counts as one step."""
        self.stepped(1)
        self._evidence = self._drafter.evidence(ids)
        if not self._evidence or room < 1:
            return []
        # Only numbers of drafts that would gain if all were accepted.
        n_drafts = max((n for n in _N_DRAFTS if self._cost(n) < n <= room), key=self._gain, default=0)
        if not n_drafts or self._credit <= (-_OVERDRAFT if self._gain(n_drafts) > 0 else 0):
            return []
        return self._drafter.propose(ids, n_drafts, generator)

    def stepped(self, n_steps: int) -> None:
        """Add the credit of `n_steps` steps; call it for steps that `draft` was not called for."""
        self._credit = min(self._credit + n_steps * _SHARE_FOR_TRIALS, _MOST_CREDIT)

    def verified(self, n_drafts: int, n_taken: int) -> None:
        """Record the result of a step with `n_drafts` drafts, of which `n_taken` were accepted."""
        self._credit += n_taken - self._cost(n_drafts)
        taken, refused = self._counts[self._evidence]
        self._counts[self._evidence] = 0.9 * taken + n_taken, 0.9 * refused + (n_taken < n_drafts)

    def _gain(self, n_drafts: int) -> float:
        """Return the expected number of steps saved, if each draft after an accepted one is accepted equally often."""
        taken, refused = self._counts[self._evidence]
        return sum((taken / (taken + refused)) ** n for n in range(1, n_drafts + 1)) - self._cost(n_drafts)

    def _cost(self, n_drafts: int) -> float:
        """Return the additional time of a step with drafts, in plain decode steps."""
        return self._costs[0] + self._costs[1] * n_drafts + self._drafter.cost(n_drafts)
