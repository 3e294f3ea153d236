"""Speculative decoding: drafts of the next tokens, and how many of them are worth verifying. `Batch` verifies them.

This file does not know how a token is chosen. `Batch` runs the model once on the last token and the drafts. Then it goes
through the places in order, and chooses each token as it would without drafts: from the same logits, by the same random
number. If the token is the draft, the next place's logits are those of the text, and it goes on. If not, the token stands
and the other drafts are dropped. So drafts never change what a seed gives, up to the rounding of a product of several rows,
which a batch has too. On a CPU in 16 bits and int8, where that rounding is coarse, each token gets the bits of a step of its
own (`DecodePlan.for_drafts`).

Leviathan et al. 2023 ("Fast Inference from Transformers via Speculative Decoding") accept a draft with a probability that
keeps the distribution. To keep each draw is stronger. Prompt lookup is from Saxena 2023 ("Prompt Lookup Decoding").
"""

from __future__ import annotations

import random
from typing import Protocol

MAX_EVIDENCE = 4
_MATCHES = (MAX_EVIDENCE, 3, 2)  # tokens; a single one that came before says too little
_N_DRAFTS = (1, 2, 4, 8, 16)

# In units of a plain decode step.
_SHARE_FOR_TRIALS = 0.01  # what each step pays in: the mean cost of drafts that are not taken
_OVERDRAFT = 0.5  # how far a promising draft may overdraw the account
_MOST_CREDIT = 3.0  # how much of a gain is kept for later


class Drafter(Protocol):
    """What makes drafts."""

    def evidence(self, ids: list[int]) -> int:
        """How much speaks for a draft of what follows `ids`, up to MAX_EVIDENCE; 0 if there is none."""

    def cost(self, n_drafts: int) -> float:
        """What this number of drafts costs now, in decode steps of the model that verifies them."""

    def propose(self, ids: list[int], n_drafts: int, generator: random.Random) -> list[int]:
        """Up to `n_drafts` tokens that may follow `ids`. The generator is the row's own and stays as it is."""


class PromptLookup:
    """Drafts what followed the last few tokens earlier in the text. The evidence is the number of these tokens."""

    def __init__(self, n_positions: int) -> None:
        self._n_positions = n_positions
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its latest occurrence
        self._n_indexed = 0

    def evidence(self, ids: list[int]) -> int:
        """The length of the longest n-gram at the end of the text that also stands earlier in it."""
        # Of a long prompt, index only what the model sees; after that, index each token once.
        for end in range(max(self._n_indexed, len(ids) - self._n_positions), len(ids)):
            for n in _MATCHES:
                if n <= end:
                    self._next[tuple(ids[end - n : end])] = end
        self._n_indexed = len(ids)
        return next((n for n in _MATCHES if tuple(ids[-n:]) in self._next), 0)

    def cost(self, n_drafts: int) -> float:
        """A dictionary lookup, which counts as nothing."""
        return 0.0

    def propose(self, ids: list[int], n_drafts: int, generator: random.Random) -> list[int]:
        """What followed the longest match. If that reaches the end of the text, the drafts repeat."""
        at = self._next[tuple(ids[-self.evidence(ids) :])]
        period = ids[at : at + n_drafts]
        return (period * (n_drafts // len(period) + 1))[:n_drafts]


class Speculation:
    """When to draft for one row, and how many tokens: as many as pay, by how often such drafts were taken so far.

    `costs` are how many plain decode steps a step with drafts takes longer: with any drafts, and for each of them. The
    credit is in the same unit. Every step pays in a small share. A step with drafts pays what it costs, and earns the tokens
    that were taken. Drafts that promise no gain are tried while there is credit: a text that is hard to predict becomes
    slower by about that share, and one that repeats itself is found soon. Costs are constants, not measured times, so that
    one seed makes the same steps in every run. Greedy steps without drafts come several at a time, so there the next look
    for drafts may be a few tokens later.
    """

    def __init__(self, drafter: Drafter, costs: tuple[float, float]) -> None:
        self._drafter = drafter
        self._costs = costs
        self._credit = 0.0
        self._evidence = 0
        # For each evidence: how many drafts were taken and refused, older ones weighted less. They start at the mean of
        # ordinary texts.
        self._counts = {evidence: (2 + 0.8 * evidence, 6 - 0.8 * evidence) for evidence in range(1, MAX_EVIDENCE + 1)}

    def draft(self, ids: list[int], room: int, generator: random.Random) -> list[int]:
        """At most `room` drafts of what follows `ids`; often none."""
        self.stepped(1)
        self._evidence = self._drafter.evidence(ids)
        if not self._evidence or room < 1:
            return []
        # Only as many as would pay if all were taken.
        n_drafts = max((n for n in _N_DRAFTS if self._cost(n) < n <= room), key=self._gain, default=0)
        if not n_drafts or self._credit <= (-_OVERDRAFT if self._gain(n_drafts) > 0 else 0):
            return []
        return self._drafter.propose(ids, n_drafts, generator)

    def stepped(self, n_steps: int) -> None:
        """Let steps pay in; those that `draft` was not called for, too."""
        self._credit = min(self._credit + n_steps * _SHARE_FOR_TRIALS, _MOST_CREDIT)

    def verified(self, n_drafts: int, n_taken: int) -> None:
        """Learn from a step with drafts: how many there were, and how many were taken."""
        self._credit += n_taken - self._cost(n_drafts)
        taken, refused = self._counts[self._evidence]
        self._counts[self._evidence] = 0.9 * taken + n_taken, 0.9 * refused + (n_taken < n_drafts)

    def _gain(self, n_drafts: int) -> float:
        """How many steps are saved on average, if each draft after a taken one is taken with the same probability."""
        taken, refused = self._counts[self._evidence]
        return sum((taken / (taken + refused)) ** n for n in range(1, n_drafts + 1)) - self._cost(n_drafts)

    def _cost(self, n_drafts: int) -> float:
        return self._costs[0] + self._costs[1] * n_drafts + self._drafter.cost(n_drafts)
