"""`gpt2 import`: make a model folder of another program's file. It reads, calls and saves; it converts nothing."""

from __future__ import annotations

import warnings
from pathlib import Path

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.model_folder import check_is_new, out_option
from gpt2.cli.options import Choice, Command, option
from gpt2.weights.foreign import TITLES, foreign_format
from gpt_config.errors import GPT2Warning
from gpt_config.locate import user_path


@click.command("import", cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("file")
@option("--from", "source", type=Choice(("auto", *TITLES)), default="auto", show_default=True, help="The format of FILE.")
@out_option("imported")
@option("--tokenizer", metavar="NAME", help="Use the tokenizer of this folder or model.  [default: the file's own]")
def import_(file: str, source: str, out: Path, tokenizer: str | None) -> None:
    """Make a model folder of another program's file.

    FILE is a TensorFlow checkpoint of OpenAI or gpt-2-simple (its folder, or one of its files), a ckpt.pt of nanoGPT, a .bin
    of llm.c, or a GGUF file. The numbers keep their dtype. Without a tokenizer in the file, a model with OpenAI's vocabulary
    gets OpenAI's; others need --tokenizer.
    """
    if not file:
        raise click.UsageError("FILE is empty: name a file or a folder")
    check_is_new(out)
    path = user_path(file)
    name = foreign_format(path) if source == "auto" else source
    from gpt2.pretrained import load_foreign, save_model
    from gpt2.weights.tokenizer import load_tokenizer_for

    model, own = load_foreign(path, name)
    if tokenizer:
        from gpt2.formats.registry import with_end_token

        own = load_tokenizer_for(model, tokenizer)
        model.config = with_end_token(model.config, own.eot_token_id)
    if own is None:
        warnings.warn(
            f"{file} has no tokenizer, and its vocabulary of {model.config.vocab_size} tokens is not OpenAI's: the folder "
            "gets none; name it with --tokenizer",
            GPT2Warning,
            2,
        )
    save_model(model, out, tokenizer=own)
    title = TITLES[name] if name else "the file"
    click.echo(f"done: the model of {title} is in {out}, in {str(model.dtype).removeprefix('torch.')}", err=True)
