"""`gpt2 quantize`: a model folder with a byte a weight. It loads, calls and saves; it computes nothing."""

from __future__ import annotations

from pathlib import Path

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.options import Command, threads_option
from gpt2.weights.folder import holds_model_files, locate_model


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("model")
@click.option("--out", required=True, metavar="FOLDER", help="Where it goes: a new folder, or one without a model.")
@threads_option
def quantize(model: str, out: str) -> None:
    """Write MODEL in int8, as an ordinary model folder with its tokenizer: a quarter of the bytes of float32.

    MODEL is a folder, a shipped model, or a hub name. Other commands take the folder by --from_pretrained. Without such a
    folder, --dtype int8 makes the same of a model each time it is loaded.
    """
    if not out:
        raise click.UsageError("--out is empty: name a folder")
    folder = locate_model(model)
    if holds_model_files(Path(out)):
        raise click.UsageError(f"--out {out} holds a model or an adapter already: choose another folder")
    from gpt2.pretrained import load_model

    load_model(folder, dtype="int8").save_pretrained(out)
    click.echo(f"done: the int8 model is in {out}", err=True)
