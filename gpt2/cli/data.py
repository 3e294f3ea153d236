"""`gpt2 data`: encode texts as `gpt2 train` does, and print what they consist of. It computes nothing itself."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.json_lines import json_line, json_option
from gpt2.cli.options import Command, option, pass_options, wrong_options


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The options of `gpt2 data`."""

    files: tuple[str, ...]
    validation_data: tuple[str, ...]
    validation_fraction: float
    text_field: str
    special_tokens: bool
    tokenizer: str
    workers: int | None
    as_json: bool


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@option("--validation_data", multiple=True, metavar="PATH", help="Validation texts.  [default: a part of the files]")
@option("--validation_fraction", type=float, default=0.1, show_default=True, help="That part of the files, from 0 to 1.")
@option("--text_field", default="text", show_default=True, help="Field or column of JSON, CSV or Parquet with the text.")
@option("--special_tokens", is_flag=True, help="Encode special tokens in texts as tokens, not as ordinary text.")
@option("--tokenizer", metavar="NAME", default="gpt2", show_default=True, help="char, bpe, or a folder or name.")
@option("--workers", type=click.IntRange(min=1), help="Processes that encode text.  [default: one per core]")
@json_option("one with model, training and validation (documents, tokens, bytes ...), shared_documents and shared_13_grams")
@pass_options(DataOptions)
def data(ctx: click.Context, options: DataOptions) -> None:
    """Report on training data: lengths, duplicates, shared text.

    A FILE is what gpt2 train --data takes: text, JSONL, JSON, CSV, TSV, Parquet, Arrow, token ids, or a folder of them. The
    same split is made as in training. Nothing is kept.
    """
    from gpt2.training.data_report import report_of
    from gpt2.training.preparation import prepare
    from gpt2.training.shakespeare import resolve

    with tempfile.TemporaryDirectory() as folder, wrong_options():
        prepared = prepare(
            [resolve(path) for path in options.files],
            folder,
            tokenizer=options.tokenizer,
            validation_data=[resolve(path) for path in options.validation_data],
            validation_fraction=options.validation_fraction,
            text_field=options.text_field,
            special_tokens=options.special_tokens,
            workers=options.workers,
            tell=partial(click.echo, err=True),
        )
        report = report_of(prepared)
        del prepared
    if options.as_json:
        click.echo(json_line({"model": options.tokenizer, **report.to_dict()}))
        return
    for line in report.lines():
        click.echo(line)
