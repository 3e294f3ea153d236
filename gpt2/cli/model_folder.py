"""What the commands that write a model folder share: the options --out and --dtype, and the writing. It converts nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.decorators import FC

from gpt2.cli.options import Choice, option
from gpt2.weights.folder import holds_model_files
from gpt_config.whole_folder import whole_folder

if TYPE_CHECKING:
    from gpt2.model import GPT2


def _new_folder(ctx: click.Context, parameter: click.Parameter, out: str) -> Path:
    if not out:
        raise click.UsageError("--out is empty: name a folder")
    return Path(out)


def out_option(kind: str) -> Callable[[FC], FC]:
    """The option `--out FOLDER` for a model of this `kind`, such as "merged". The command calls `check_is_new` with it."""
    text = f"Folder of the {kind} model: a new one, or one without a model."
    return option("--out", required=True, metavar="FOLDER", callback=_new_folder, help=text)


def dtype_option() -> Callable[[FC], FC]:
    """The option `--dtype` of the written weights."""
    choice = Choice(("float32", "float16", "bfloat16"))
    return option("--dtype", type=choice, default="float32", show_default=True, help="Dtype of the written weights.")


def check_is_new(out: Path) -> None:
    """Raise UsageError if `out` contains files of a model."""
    if holds_model_files(out):
        raise click.UsageError(f"--out {out} already contains a model or an adapter: choose another folder")


def write_model(model: GPT2, out: Path, source: Path, dtype: str | None = None) -> None:
    """Write `model` and, if the folder `source` has an instruction template, the same template into `out`."""
    from gpt2.finetuning.template import TEMPLATE_FILE, InstructionTemplate
    from gpt2.pretrained import save_model

    with whole_folder(out) as new:
        save_model(model, new, dtype=dtype)
        if (source / TEMPLATE_FILE).exists():
            InstructionTemplate.load(source).save(new)
