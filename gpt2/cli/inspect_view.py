"""The terminal view of `gpt2 inspect`: lines of text for an Overview. It prints nothing and computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt2.inspection.overviews import Guess, Overview

_WIDTH = 24  # characters of the longest bar
_MEASURES = {
    "previous": "the token before",
    "duplicate": "the same token earlier",
    "induction": "the token after it (induction)",
    "logit": "writes to the prediction",
}


def summary(shown: Overview) -> str:
    """The first line: the model, the size of the text, its loss, and what was changed."""
    loss = "" if shown.loss is None else f"loss {shown.loss:.3f} nats per token"
    return ", ".join(filter(None, [shown.model, f"{len(shown.ids)} tokens", loss, shown.change]))


def next_lines(shown: Overview) -> Iterator[str]:
    """The most probable next tokens, with bars."""
    guesses = shown.guesses[-1]
    width = max(len(repr(one.label)) for one in guesses)
    for one in guesses:
        bar = "\u2588" * max(round(_WIDTH * one.probability / guesses[0].probability), 0)
        yield f"{one.label!r:<{width}}  {one.probability:6.1%}  {bar}".rstrip()


def lens_lines(shown: Overview, n: int = 4) -> Iterator[str]:
    """What the lens predicts after the last token: a line for each layer."""
    lines = [
        [_named(one) for one in line[-1][:n]]
        for name, line in zip(shown.lens_names, shown.lens, strict=True)
        if name.endswith("hook_resid_post")
    ]
    yield from _aligned([[f"layer {layer}", *line] for layer, line in enumerate(lines)])


def head_lines(shown: Overview, n: int = 4) -> Iterator[str]:
    """The best heads by each measure, as layer.head and score."""
    rows = []
    for measure, heads in shown.notable_heads(n).items():
        sign = "+" if measure == "logit" else ""
        rows.append([_MEASURES[measure], *(f"{one.layer}.{one.head} {one.score:{sign}.2f}" for one in heads)])
    yield from _aligned(rows)


def attribution_lines(shown: Overview) -> Iterator[str]:
    """How much each token raises the log-probability of the prediction, in nats, with bars."""
    assert shown.attribution is not None
    scores = shown.attribution.scores
    largest = max(map(abs, scores)) or 1.0
    width = max(len(repr(label)) for label in shown.labels)
    for label, score in zip(shown.labels, scores, strict=True):
        bar = ("\u2588" if score >= 0 else "\u2591") * round(_WIDTH * abs(score) / largest)
        yield f"{label!r:<{width}}  {score:+6.2f}  {bar}".rstrip()
    yield f"sum {sum(scores):+.3f} of {shown.attribution.total:+.3f}"


def patching_lines(shown: Overview) -> Iterator[str]:
    """The changes of the log-probability by patching: a line for each token, a column for each layer."""
    from gpt2.inspection.overviews import signed

    assert shown.patching is not None
    found = shown.patching
    rows = [["", *(f"{layer:>5}" for layer in range(shown.n_layer))]]
    for place, (label, other) in enumerate(zip(shown.labels, found.labels, strict=True)):
        name = repr(label) if label == other else f"{label!r} <- {other!r}"
        rows.append([name, *(signed(value) for value in found.changes[:, place].tolist())])
    yield from _aligned(rows)
    yield f"log-probability {found.before:.2f} here, {found.other:.2f} after the other text"


def change_lines(
    before: Sequence[Guess], after: Sequence[Guess], losses: tuple[float | None, float | None]
) -> Iterator[str]:
    """The most probable tokens of the unchanged model beside those of the changed one, and the loss of the text."""
    n = min(4, len(before))
    rows = [["unchanged", *map(_named, before[:n])], ["changed", *map(_named, after[:n])]]
    yield from _aligned(rows)
    if losses[0] is not None and losses[1] is not None:
        yield f"loss of the text {losses[0]:.3f} -> {losses[1]:.3f} nats per token"


def _named(one: Guess) -> str:
    return f"{one.label!r} {one.probability:.0%}"


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
