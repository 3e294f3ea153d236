"""`gpt2 merge`: merge an adapter into the model it was trained on. It calls and prints; it computes nothing."""

from __future__ import annotations

from pathlib import Path

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.model_folder import check_is_new, dtype_option, out_option, write_model
from gpt2.cli.options import Command
from gpt2.weights.folder import ADAPTER_CONFIG_FILE, is_adapter_folder, locate_model
from gpt_config.errors import CheckpointError


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("adapter")
@out_option("merged")
@dtype_option()
@click.option(
    "--from_pretrained", metavar="NAME", help="The model that the adapter was trained on.  [default: named in the adapter]"
)
def merge(adapter: str, out: Path, dtype: str, from_pretrained: str | None) -> None:
    """Merge a LoRA adapter into its model.

    ADAPTER is a folder or hub name of LoRA weights in peft's format. --out becomes an ordinary model folder with its
    tokenizer. Merging is optional: other commands take an adapter as --from_pretrained too, and merge it at each start.
    """
    folder = locate_model(adapter)
    if not is_adapter_folder(folder):
        raise CheckpointError(f"{adapter} contains no {ADAPTER_CONFIG_FILE}: name the folder of an adapter")
    check_is_new(out)
    from gpt2.pretrained import load_merged

    write_model(load_merged(folder, from_pretrained), out, folder, dtype)
    click.echo(f"done: the merged model is in {out}", err=True)
