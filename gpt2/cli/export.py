"""`gpt2 export`: write a model in the format of another program. It loads, calls and reports; it converts nothing."""

from __future__ import annotations

from pathlib import Path

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.options import Choice, Command, option, revision_option
from gpt2.weights.folder import holds_model_files, locate_float_model
from gpt2.weights.foreign import TITLES, WRITTEN_TITLES

# The formats, those that are folders, and all dtypes that one of them has: `gpt2.formats`, whose modules import torch.
FORMATS = (*TITLES, *WRITTEN_TITLES, "safetensors")
_FOLDERS = ("openai", *WRITTEN_TITLES, "safetensors")
DTYPES = ("float32", "float16", "bfloat16", "q8_0", "int8")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("model")
@option("--to", required=True, type=Choice(FORMATS), help="The format to write.")
@option(
    "--out", required=True, metavar="PATH", help="File or, for openai, onnx, ctranslate2 and safetensors, folder to write."
)
@option("--dtype", type=Choice(DTYPES), default="float32", show_default=True, help="Dtype of the written weights.")
@option("--tokenizer", metavar="NAME", help="Use the tokenizer of this folder or model.  [default: the model's own]")
@revision_option(of="model")
def export(model: str, to: str, out: str, dtype: str, tokenizer: str | None) -> None:
    """Write a model for another program.

    MODEL is a folder, a shipped model or a hub name. --to is openai (OpenAI's TensorFlow checkpoint), nanogpt (ckpt.pt),
    llmc (llm.c), gguf (llama.cpp), onnx (onnxruntime, transformers.js), ctranslate2, or safetensors (a model folder in
    another dtype). The file is read back and its greedy tokens are compared before it gets its name.
    """
    if not out:
        raise click.UsageError("--out is empty: name a file")
    place = Path(out)
    folder = locate_float_model(model)
    is_new_folder = to in _FOLDERS and place.is_dir() and not holds_model_files(place) and not any(place.glob("*.index"))
    if place.exists() and not is_new_folder:
        raise click.UsageError(f"--out {out} exists: choose another path")
    from gpt2.formats.export import export_model
    from gpt2.formats.registry import load_format
    from gpt2.pretrained import load_model
    from gpt2.weights.tokenizer import tokenizer_of
    from gpt_encoder.tokenizer import load_tokenizer

    loaded = load_model(folder)
    own = load_tokenizer(tokenizer) if tokenizer else tokenizer_of(loaded)
    same = export_model(loaded, own, place, to=to, dtype=dtype)
    click.echo(
        f"done: {out} is {load_format(to).TITLE} in {dtype}; {same.n_equal} of {same.n_ids} greedy tokens are those of the "
        "model",
        err=True,
    )
