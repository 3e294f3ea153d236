"""`gpt2 quantize`: write a model with one byte per weight. It loads, calls and saves; it computes nothing."""

from __future__ import annotations

from pathlib import Path

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.model_folder import check_is_new, out_option, write_model
from gpt2.cli.options import Command, revision_option, threads_option
from gpt2.weights.folder import locate_model


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("model")
@out_option("int8")
@revision_option(of="model")
@threads_option()
def quantize(model: str, out: Path) -> None:
    """Convert a model to int8: a quarter of float32's bytes.

    MODEL is a folder, a shipped model, or a hub name. --out becomes a model folder with its tokenizer, for the
    --from_pretrained of this package's commands; gpt2 dequantize makes an ordinary folder of it. Without this command,
    --dtype int8 converts a model each time it is loaded.
    """
    folder = locate_model(model)
    check_is_new(out)
    from gpt2.pretrained import load_model

    write_model(load_model(folder, dtype="int8"), out, folder)
    click.echo(f"done: the int8 model is in {out}", err=True)
