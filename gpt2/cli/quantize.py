"""`gpt2 quantize`: write a model with one byte per weight. It loads, calls and saves; it computes nothing."""

from __future__ import annotations

from pathlib import Path

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.options import Command, revision_option, threads_option
from gpt2.weights.folder import holds_model_files, locate_model


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("model")
@click.option("--out", required=True, metavar="FOLDER", help="Folder of the int8 model: a new one, or one without a model.")
@revision_option(of="model")
@threads_option()
def quantize(model: str, out: str) -> None:
    """Convert a model to int8: a quarter of float32's bytes.

    MODEL is a folder, a shipped model, or a hub name. --out becomes an ordinary model folder with its tokenizer, for the
    --from_pretrained of other commands. Without this command, --dtype int8 converts a model each time it is loaded.
    """
    if not out:
        raise click.UsageError("--out is empty: name a folder")
    folder = locate_model(model)
    if holds_model_files(Path(out)):
        raise click.UsageError(f"--out {out} already contains a model or an adapter: choose another folder")
    from gpt2.pretrained import load_model

    load_model(folder, dtype="int8").save_pretrained(out)
    click.echo(f"done: the int8 model is in {out}", err=True)
