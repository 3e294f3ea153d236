"""The kinds of steps of a batch, as values. `Batch` chooses and runs them; `--verbose` counts and prints them.

A step is one or a few forward passes. The tokens do not depend on the kind of step. This module depends on no other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Prefill:
    """Prefill the prompts of `n_rows` new rows, and give each its first token.

    The same pass over the weights may give the `n_running` rows of the batch their next token.
    """

    n_rows: int
    n_running: int = 0

    name = "prefill"


@dataclass(frozen=True)
class VerifyDrafts:
    """Compute the only row's last token and its drafts in one forward pass."""

    drafts: tuple[int, ...]

    name = "verify drafts"


@dataclass(frozen=True)
class GreedyTokens:
    """Give the only row `n_tokens` greedy tokens."""

    n_tokens: int

    name = "several greedy tokens"


@dataclass(frozen=True)
class OneToken:
    """Give each row one token."""

    n_rows: int

    name = "one token per row"


@dataclass(frozen=True)
class BeamSearch:
    """Run a complete beam search from one prompt, for `n_rows` rows."""

    n_rows: int

    name = "beam search"


Step = Prefill | VerifyDrafts | GreedyTokens | OneToken | BeamSearch


@dataclass
class StepCounts:
    """Counts the steps of each kind. Call it with each step, for example as `on_step`.

    >>> counts = StepCounts()
    >>> counts(Prefill(n_rows=2)), counts(OneToken(n_rows=2)), counts(OneToken(n_rows=1))
    (None, None, None)
    >>> str(counts)
    'prefill 1, one token per row 2'
    """

    by_name: Counter[str] = field(default_factory=Counter)

    def __call__(self, step: Step) -> None:
        self.by_name[step.name] += 1

    def __str__(self) -> str:
        return ", ".join(f"{name} {n}" for name, n in self.by_name.items()) or "none"
