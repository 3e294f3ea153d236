"""`gpt2 merge`: an adapter and the model it was learned on become one model. It calls and prints; it computes nothing."""

from __future__ import annotations

from pathlib import Path

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.options import Command
from gpt2.weights.folder import ADAPTER_CONFIG_FILE, holds_model_files, is_adapter_folder, locate_model
from gpt_config.errors import CheckpointError


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("adapter")
@click.option("--out", required=True, metavar="FOLDER", help="Where the model goes: a new folder, or one without a model.")
@click.option("--from_pretrained", metavar="NAME", help="The model it was learned on.  [default: the adapter says which]")
def merge(adapter: str, out: str, from_pretrained: str | None) -> None:
    """Write ADAPTER, merged into the model it was learned on, as an ordinary model folder with its tokenizer.

    ADAPTER is a folder or a hub name of LoRA weights as peft writes them. Adapters need not be merged to be used: other
    commands take them by --from_pretrained too, and merge them each time.
    """
    if not out:
        raise click.UsageError("--out is empty: name a folder")
    folder = locate_model(adapter)
    if not is_adapter_folder(folder):
        raise CheckpointError(f"{adapter} holds no {ADAPTER_CONFIG_FILE}: name the folder of an adapter")
    if holds_model_files(Path(out)):
        raise click.UsageError(f"--out {out} holds a model or an adapter already: choose another folder")
    from gpt2.finetuning.template import TEMPLATE_FILE, InstructionTemplate
    from gpt2.pretrained import load_merged

    model = load_merged(folder, from_pretrained)
    model.save_pretrained(out)
    if (folder / TEMPLATE_FILE).exists():
        InstructionTemplate.load(folder).save(out)
    click.echo(f"done: the merged model is in {out}", err=True)
