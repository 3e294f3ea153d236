"""What one step of a batch does, as a value: chosen once by `Batch`, then run, counted and shown.

Each step is one or a few forward passes. The tokens do not depend on which of them is chosen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Prefill:
    """Read the prompts of `n_rows` rows that join the batch, and give each its first token."""

    n_rows: int

    name = "prefill"


@dataclass(frozen=True)
class VerifyDrafts:
    """Read the only row's last token and its drafts in one forward pass."""

    drafts: tuple[int, ...]

    name = "verify drafts"


@dataclass(frozen=True)
class GreedyTokens:
    """Give the only row `n_tokens` most probable tokens in a row."""

    n_tokens: int

    name = "several greedy tokens"


@dataclass(frozen=True)
class OneToken:
    """Give each row one token."""

    n_rows: int

    name = "one token a row"


@dataclass(frozen=True)
class BeamSearch:
    """Search from one prompt to the end, for `n_rows` rows."""

    n_rows: int

    name = "beam search"


Step = Prefill | VerifyDrafts | GreedyTokens | OneToken | BeamSearch


@dataclass
class StepCounts:
    """How many steps of each kind there were; call it with each step.

    >>> counts = StepCounts()
    >>> counts(Prefill(n_rows=2)), counts(OneToken(n_rows=2)), counts(OneToken(n_rows=1))
    (None, None, None)
    >>> str(counts)
    'prefill 1, one token a row 2'
    """

    by_name: Counter[str] = field(default_factory=Counter)

    def __call__(self, step: Step) -> None:
        self.by_name[step.name] += 1

    def __str__(self) -> str:
        return ", ".join(f"{name} {n}" for name, n in self.by_name.items()) or "none"
