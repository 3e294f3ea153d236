"""`gpt2 inspect`: show what the model does with a text. `gpt2.inspection` computes and draws; this calls and prints."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpt2.cli import inspect_view as view
from gpt2.cli.group import CONTEXT_SETTINGS, decode_argument, read_stdin
from gpt2.cli.json_lines import json_line
from gpt2.cli.model_option import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, TOKENIZER_HELP, load_model_option
from gpt2.cli.options import Command, option, pass_options, revision_option, threads_option
from gpt_config.atomic_write import atomic_write_text
from gpt_config.errors import InputError

if TYPE_CHECKING:
    from gpt2.inspection.overviews import Overview


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """The options of `gpt2 inspect`."""

    text: str
    from_pretrained: str | None
    model_name: str | None
    html: str | None
    png: str | None
    json: str | None
    lens: bool
    heads: bool
    ablate: tuple[str, ...]
    patch: str | None
    attribute: bool
    device: str
    dtype: str


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("text")
@option("--from_pretrained", group="Model", metavar="NAME", help=MODEL_HELP)
@revision_option("Model")
@option("--model_name", group="Model", metavar="NAME", help=TOKENIZER_HELP)
@option("--html", group="Output", metavar="FILE", help="Write a page for the browser, of at most 128 tokens.")
@option("--png", group="Output", metavar="FOLDER", help="Write pictures, of at most 128 tokens. They need matplotlib.")
@option("--json", group="Output", metavar="FILE", help='Write all figures as one JSON object; "-" is stdout.')
@option("--lens", is_flag=True, group="Parts", help="Print what the logit lens predicts after each layer.")
@option("--heads", is_flag=True, group="Parts", help="Print the heads with the highest scores.")
@option(
    "--ablate",
    multiple=True,
    group="Changes",
    metavar="LAYER.HEAD",
    help="Show the model without this head. May be given several times.",
)
@option(
    "--patch",
    group="Changes",
    metavar="OTHER",
    help="Print how activations of OTHER, a text of as many tokens, change the prediction.",
)
@option("--attribute", is_flag=True, group="Parts", help="Print how much each token matters for the prediction.")
@threads_option("Speed")
@option("--device", default="auto", show_default=True, group="Speed", help=DEVICE_HELP)
@option("--dtype", default="float32", show_default=True, group="Speed", help=DTYPE_HELP)
@pass_options(InspectOptions)
def inspect(ctx: click.Context, options: InspectOptions) -> None:
    """Show what the model does with a text.

    A TEXT of "-" is standard input. Without --lens and --heads, the next token, the logit lens and the notable heads are
    printed. LAYER.HEAD such as 5.1 counts both from 0.
    """
    heads = [_head(name) for name in options.ablate]
    text = read_stdin() if options.text == "-" else decode_argument(options.text, "the text")
    other = None if options.patch is None else decode_argument(options.patch, "the text of --patch")
    _check_outputs(options)
    model, tokenizer, name = load_model_option(
        options.from_pretrained, device=options.device, dtype=options.dtype, tokenizer_name=options.model_name
    )
    from gpt2.inspection import ablate_heads, intervene
    from gpt2.inspection.overviews import overview

    wrong = [f"{layer}.{head}" for layer, head in heads if layer >= len(model.h) or head >= model.config.n_head]
    if wrong:
        raise InputError(
            f"there is no head {wrong[0]}: {name} has {len(model.h)} layers of {model.config.n_head} heads, from 0"
        )
    change = f"without head {', '.join(options.ablate)}" if heads else ""
    unchanged = overview(model, text, tokenizer=tokenizer) if heads else None
    with intervene(model, ablate_heads(heads)) if heads else contextlib.nullcontext():
        shown = overview(
            model,
            text,
            tokenizer=tokenizer,
            attribute=options.attribute,
            patch_from=other,
            name=name,
            change=change,
        )
    _write(options, shown)
    if options.json != "-":
        click.echo("\n".join(_lines(options, shown, unchanged)))


def _head(name: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", name, re.ASCII)
    if found is None:
        raise click.UsageError(f"--ablate {name!r} must be LAYER.HEAD, such as 5.1")
    return int(found[1]), int(found[2])


def _check_outputs(options: InspectOptions) -> None:
    """Refuse, before the model is loaded, what could not be written after it has run."""
    for name, path in (("--html", options.html), ("--json", options.json)):
        if path is not None and path != "-" and Path(path).is_dir():
            raise InputError(f"{name} {path} is a folder: give the name of a file")
    if options.png is not None:
        from gpt2.inspection.pictures import check_matplotlib

        check_matplotlib()
        if Path(options.png).exists() and not Path(options.png).is_dir():
            raise InputError(f"--png {options.png} is a file: give the name of a folder")


def _write(options: InspectOptions, shown: Overview) -> None:
    """Write the files that are asked for. The page is made before the first is written: it may be too long."""
    from gpt2.inspection.page import html_page

    html = None if options.html is None else html_page(shown)
    if options.png is not None:
        from gpt2.inspection.pictures import save_pictures

        save_pictures(shown, options.png)
    if options.html is not None and html is not None:
        atomic_write_text(options.html, html)
    if options.json == "-":
        click.echo(json_line(shown.to_dict()))
    elif options.json is not None:
        atomic_write_text(options.json, json_line(shown.to_dict()) + "\n")


def _lines(options: InspectOptions, shown: Overview, unchanged: Overview | None) -> Iterator[str]:
    yield view.summary(shown)
    chosen = options.lens or options.heads
    if unchanged is not None:
        yield "\nThe next token and the loss:"
        yield from view.change_lines(unchanged.guesses[-1], shown.guesses[-1], (unchanged.loss, shown.loss))
    if not chosen:
        yield "\nNext token:"
        yield from view.next_lines(shown)
    if options.lens or not chosen:
        yield "\nLogit lens after the last token:"
        yield from view.lens_lines(shown)
    if options.heads or not chosen:
        yield "\nHeads that attend to ..., and the parts of the logit that they write:"
        yield from view.head_lines(shown)
    if shown.attribution is not None:
        yield f"\nTokens that matter for {shown.attribution.target.label!r}, in nats:"
        yield from view.attribution_lines(shown)
    if shown.patching is not None:
        yield f"\nPatching: the change of the log-probability of {shown.patching.target.label!r}, in nats, by layer:"
        yield from view.patching_lines(shown)
