"""`gpt2 verify`: run the checks of `gpt2.verification` and print a table or JSON. It computes nothing itself."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.json_lines import json_line, json_option
from gpt2.cli.options import Command, threads_option
from gpt2.weights.folder import is_model_folder, locate_float_model
from gpt_config.errors import CheckpointError
from gpt_config.shipped import shipped_models

if TYPE_CHECKING:
    from gpt2.verification import Outcome

_RANDOM = "random"


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("model", required=False)
@json_option("one with model, failed (a count) and checks")
@threads_option()
def verify(model: str | None, as_json: bool) -> None:
    """Check that independent engines compute the same numbers.

    PyTorch, NumPy, plain Python, transformers and tiktoken (the last two if installed) are compared part by part on MODEL: a
    folder, a shipped model (the default), a hub name, or "random" for a tiny model of random weights. The exit status is 1
    if a check fails. A model of 124M takes minutes, because plain Python is slow.
    """
    name = model or next(iter(shipped_models()), _RANDOM)
    folder = None if name == _RANDOM else locate_float_model(name)  # before torch is imported
    if folder is not None and not is_model_folder(folder):
        raise CheckpointError(f"{name} is not a model: name a folder that contains config.json and the weights")
    from tqdm.auto import tqdm

    from gpt2.verification import Status
    from gpt2.verification import verify as run_checks
    from gpt2.verification.whole import random_model

    bar = tqdm(file=sys.stderr, unit="check", leave=False, disable=None)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar, random_model() if folder is None else contextlib.nullcontext(folder) as place:
        outcomes = list(run_checks(place, show))
    failed = sum(outcome.status == Status.FAIL for outcome in outcomes)
    if as_json:
        checks = [dataclasses.asdict(outcome) for outcome in outcomes]
        click.echo(json_line({"model": name, "failed": failed, "checks": checks}))
    else:
        _print_table(name, outcomes)
    if failed:
        sys.exit(1)


def _print_table(name: str, outcomes: list[Outcome]) -> None:
    from gpt2.verification.checks import SMALL

    head = ("part", "subject", "against", "numbers", "largest", "relative", "allowed", "result")
    rows = [head, *(_row(outcome) for outcome in outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row, note in zip(rows, ["", *(outcome.note for outcome in outcomes)], strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(f"{line}  {note}".rstrip())
    reasons = {outcome.tolerance.value: outcome.tolerance.reason for outcome in outcomes if outcome.tolerance}
    click.echo(
        "\nlargest: the largest |subject - against|; relative: that, divided by the largest |against|,"
        f"\n  or by {SMALL:g} if that is more"
    )
    for value, reason in reasons.items():
        click.echo(f"allowed {value:g}: {reason}")
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in {o.status for o in outcomes}}
    click.echo(f"\n{name}: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())))


def _row(outcome: Outcome) -> tuple[str, ...]:
    differences = ["" if value is None else f"{value:.1e}" for value in (outcome.absolute, outcome.relative)]
    allowed = f"{outcome.tolerance.value:g}" if outcome.tolerance else ""
    return (outcome.part, outcome.subject, outcome.oracle, outcome.dtype, *differences, allowed, outcome.status.value)
