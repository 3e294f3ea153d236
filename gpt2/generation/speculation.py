"""Speculative decoding: guesses of the next tokens, and how many of them are worth a try. The decode loop verifies them.

It knows nothing of how a token is chosen. The loop runs the model once on the last token and the drafts; then, place by
place, it chooses the token as it would without drafts, from logits that have only taken tokens before them, and by the
same random number. Where that is the draft, the next place's logits are those of the text and the loop goes on; where it
is not, the chosen token stands and the rest of the drafts is forgotten. So a draft is a guess of the draw and never part
of it: whatever is guessed, a seed gives the tokens that it gives without speculation, up to the rounding of a product
of several rows, which is also that of a batch (in 16 bits and in int8, where that would be coarse, each row has the bits of
a step of its own, on a CPU). Leviathan et al. 2023 ("Fast Inference from Transformers via
Speculative Decoding") accept a draft with a probability that keeps the distribution; to keep the draw itself is
stronger, and equal to theirs for drafts without a distribution. Prompt lookup is Saxena's (2023, "Prompt Lookup
Decoding").
"""

from __future__ import annotations

import random
from typing import Protocol

_MATCHES = (4, 3, 2)  # tokens; a single one that came before says too little
_N_DRAFTS = (1, 2, 4, 8, 16)

# In units of a plain decode step: what may be paid on average for drafts that are not taken; how far a promising draft may
# overdraw the account; and how much of a gain is kept for later.
_SHARE_FOR_TRIALS = 0.01
_OVERDRAFT = 0.5
_MOST_CREDIT = 3.0


class Drafter(Protocol):
    """Whoever guesses."""

    def evidence(self, ids: list[int]) -> int:
        """What speaks for a guess of what follows `ids`: the larger the more, 0 where there is none to be made."""

    def cost(self, n_drafts: int) -> float:
        """What as many guesses now cost, in decode steps of the model that is to verify them."""

    def propose(self, ids: list[int], n_drafts: int, generator: random.Random) -> list[int]:
        """Up to `n_drafts` tokens that may follow `ids`. The generator is the row's own and stays as it is."""


class PromptLookup:
    """Guesses that what followed the last few tokens before will follow them again. The evidence is how many they are."""

    def __init__(self, n_positions: int) -> None:
        self._n_positions = n_positions
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind its latest occurrence
        self._n_indexed = 0

    def evidence(self, ids: list[int]) -> int:
        """The length of the longest n-gram that ends the text and stands before in it."""
        # Of a long prompt only what the model sees; then each token once.
        for end in range(max(self._n_indexed, len(ids) - self._n_positions), len(ids)):
            for n in _MATCHES:
                if n <= end:
                    self._behind[tuple(ids[end - n : end])] = end
        self._n_indexed = len(ids)
        return next((n for n in _MATCHES if tuple(ids[-n:]) in self._behind), 0)

    def cost(self, n_drafts: int) -> float:
        """Next to nothing."""
        return 0.0

    def propose(self, ids: list[int], n_drafts: int, generator: random.Random) -> list[int]:
        """What followed the longest match; where that reaches the end of the text, it goes on with the guess itself."""
        at = self._behind[tuple(ids[-self.evidence(ids) :])]
        period = ids[at : at + n_drafts]
        return (period * (n_drafts // len(period) + 1))[:n_drafts]


class Speculation:
    """When to draft for one row, and how much: as many tokens as pay, by how often such drafts were taken so far.

    `credit` is an account in units of a plain decode step. Every step pays in a small share; a step with drafts pays for
    what it takes longer than a plain one and earns the tokens that were taken. Drafts that promise no gain are tried while
    there is credit, so a text that cannot be guessed is slower by about that share, and one that can is soon found out.
    Costs are figures, not measured times, so that one seed makes the same steps in every run. Greedy steps without drafts
    come several at a time, as many as the clock allows, so there the next look for drafts may be a few tokens later.
    """

    def __init__(self, drafter: Drafter, costs: tuple[float, float]) -> None:
        self._drafter = drafter
        self._costs = costs
        self._credit = 0.0
        self._evidence = 0
        # By evidence, drafts taken and refused; older ones count less. They begin with what ordinary texts showed.
        self._counts = {evidence: (2 + 0.8 * evidence, 6 - 0.8 * evidence) for evidence in range(1, 5)}

    def draft(self, ids: list[int], room: int, generator: random.Random) -> list[int]:
        """At most `room` guesses of what follows `ids`, often none."""
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
        """Let steps pay in, also those for which nobody asked for drafts."""
        self._credit = min(self._credit + n_steps * _SHARE_FOR_TRIALS, _MOST_CREDIT)

    def verified(self, n_drafts: int, n_taken: int) -> None:
        """Learn from a step with drafts: how many there were, and how many were the tokens."""
        self._credit += n_taken - self._cost(n_drafts)
        taken, refused = self._counts[self._evidence]
        self._counts[self._evidence] = 0.9 * taken + n_taken, 0.9 * refused + (n_taken < n_drafts)

    def _gain(self, n_drafts: int) -> float:
        """How many steps are saved on average, if each draft behind one that is taken is taken with the same probability."""
        taken, refused = self._counts[self._evidence]
        return sum((taken / (taken + refused)) ** n for n in range(1, n_drafts + 1)) - self._cost(n_drafts)

    def _cost(self, n_drafts: int) -> float:
        return self._costs[0] + self._costs[1] * n_drafts + self._drafter.cost(n_drafts)
