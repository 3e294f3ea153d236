"""`gpt2 verify`: run the checks of `gpt2.verification` and print a table or JSON. It computes nothing itself."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.json_lines import json_line, json_option
from gpt2.cli.options import Command, option, threads_option
from gpt2.weights.folder import foreign_model, is_model_folder, locate_float_model, locate_whole_model, written_model
from gpt2.weights.foreign import WRITTEN_TITLES
from gpt_config.errors import CheckpointError
from gpt_config.locate import user_path
from gpt_config.shipped import shipped_models

if TYPE_CHECKING:
    from gpt2.verification import Outcome

_RANDOM = "random"


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("model", required=False)
@option("--against", metavar="FOLDER", help="Compare MODEL with this model only; MODEL may be a file of another program.")
@json_option("one with model, failed (a count) and checks")
@threads_option()
def verify(model: str | None, against: str | None, as_json: bool) -> None:
    """Check that independent engines compute the same numbers.

    PyTorch, NumPy, plain Python, transformers and tiktoken (the last two if installed) are compared part by part on MODEL: a
    folder, a shipped model (the default), a hub name, or "random" for a tiny model of random weights. The exit status is 1
    if a check fails. A model of 124M takes minutes, because plain Python is slow.

    With --against, MODEL is compared with FOLDER, the model that it was made from or that was made of it: weights, tokens,
    logits and greedy ids. MODEL may then be a file or folder that gpt2 export writes or gpt2 import reads.
    """
    if against is not None and model is None:
        raise click.UsageError("--against compares MODEL with a folder: name MODEL too")
    name = model or next(iter(shipped_models()), _RANDOM)
    outcomes = _run_all(name) if against is None else _run_against(name, against)
    failed = sum(outcome.status == "fail" for outcome in outcomes)
    if as_json:
        checks = [dataclasses.asdict(outcome) for outcome in outcomes]
        click.echo(json_line({"model": name, "failed": failed, "checks": checks}))
    else:
        _print_table(name, outcomes)
    if failed:
        sys.exit(1)


def _run_against(name: str, against: str) -> list[Outcome]:
    folder = locate_whole_model(against)  # before torch is imported
    path = user_path(name)
    if not foreign_model(path) and not written_model(path):
        _refuse_unknown_file(name)
        path = locate_whole_model(name)
    from gpt2.verification.against import compare

    return list(compare(path, folder))


def _run_all(name: str) -> list[Outcome]:
    foreign = foreign_model(name)
    if written := written_model(name):
        raise CheckpointError(
            f"{name} is {WRITTEN_TITLES[written[1]]}, which other programs run: name the model to compare it with, "
            "by --against FOLDER"
        )
    if not foreign:
        _refuse_unknown_file(name)
    folder = None if foreign or name == _RANDOM else locate_float_model(name)  # before torch is imported
    if folder is not None and not is_model_folder(folder):
        raise CheckpointError(f"{name} is not a model: name a folder that contains config.json and the weights")
    from tqdm.auto import tqdm

    from gpt2.verification import verify as run_checks
    from gpt2.verification.whole import random_model

    bar = tqdm(file=sys.stderr, unit="check", leave=False, disable=None)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    place = _imported(*foreign) if foreign else random_model() if folder is None else contextlib.nullcontext(folder)
    with bar, place as source:
        return list(run_checks(source, show))


def _refuse_unknown_file(name: str) -> None:
    if user_path(name).is_file():
        raise CheckpointError(
            f"{name} is no file that gpt2 import reads: it may be damaged, so copy it again, or name a model folder"
        )


@contextlib.contextmanager
def _imported(path: Path, form: str) -> Iterator[Path]:
    """A temporary folder with the model of another program's file."""
    import tempfile

    from gpt2.pretrained import load_foreign, save_model

    model, tokenizer = load_foreign(path, form)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder, tokenizer=tokenizer)
        yield Path(folder)


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
