"""`gpt2 dequantize`: write an int8 model as an ordinary model folder. It loads, calls and saves; it computes nothing."""

from __future__ import annotations

from pathlib import Path

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.model_folder import check_is_new, dtype_option, out_option, write_model
from gpt2.cli.options import Command, revision_option
from gpt2.weights.folder import locate_whole_model
from gpt_config.errors import CheckpointError


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("model")
@out_option("converted")
@dtype_option()
@revision_option(of="model")
def dequantize(model: str, out: Path, dtype: str) -> None:
    """Convert an int8 model to an ordinary one.

    MODEL is a folder that gpt2 quantize wrote. --out becomes an ordinary model folder with its tokenizer, which can be
    trained and which transformers loads. Its weights are those of int8: what quantization has rounded stays rounded.
    """
    folder = locate_whole_model(model)
    check_is_new(out)
    from gpt2 import pretrained
    from gpt2.quantization.quantize import dequantize, is_int8

    int8_model = pretrained.load_model(folder)
    if not is_int8(int8_model):
        raise CheckpointError(f"{model} is not in int8: name a folder that gpt2 quantize wrote")
    write_model(dequantize(int8_model), out, folder, dtype)
    click.echo(f"done: the model in {dtype} is in {out}", err=True)
