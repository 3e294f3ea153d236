"""`gpt2 embed`: read texts, call `gpt2.evaluation.embedding`, write the vectors. It computes nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.json_lines import json_option
from gpt2.cli.model_option import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, TOKENIZER_HELP, load_model_option
from gpt2.cli.options import Choice, Command, option, pass_options, revision_option, threads_option, wrong_options
from gpt_config.atomic_write import atomic_write
from gpt_config.errors import InputError
from gpt_config.json_text import to_json

if TYPE_CHECKING:
    from torch import Tensor

    from gpt2.data.texts import PlacedText

_SUFFIXES = (".npy", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """The options of `gpt2 embed`."""

    file: str
    from_pretrained: str | None
    model_name: str | None
    text_field: str
    pooling: str
    layer: int
    normalize: bool
    batch_size: int
    device: str
    dtype: str
    out: str | None
    as_json: bool


# Options under the headings of --help.
_input, _vectors = partial(option, group="Texts and model"), partial(option, group="Vectors")
_speed = partial(option, group="Speed")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("file", metavar="FILE")
@_input("--text_field", default="text", show_default=True, help="Field or column of JSON, CSV or Parquet with the text.")
@_input("--from_pretrained", metavar="NAME", help=MODEL_HELP)
@revision_option("Texts and model")
@_input("--model_name", metavar="NAME", help=TOKENIZER_HELP)
@_vectors(
    "--pooling",
    type=Choice(("mean", "last")),
    default="mean",
    show_default=True,
    help="The mean of the hidden states of all tokens, or that of the last token.",
)
@_vectors(
    "--layer",
    type=int,
    default=-1,
    show_default=True,
    help="0: the embeddings; N: after block N; -1: the last one, after the final norm; -2: the one before it.",
)
@_vectors("--normalize", is_flag=True, help="Scale each vector to length 1.")
@_speed("--batch_size", type=click.IntRange(min=1), default=32, show_default=True, help="Texts to run at once.")
@threads_option("Speed")
@_speed("--device", default="auto", show_default=True, help=DEVICE_HELP)
@_speed("--dtype", default="float32", show_default=True, help=DTYPE_HELP)
@option("--out", group="Output", metavar="FILE", help="Write a .npy, .jsonl or .parquet file.  [default: JSON on stdout]")
@json_option("one per text, with its other fields, text, embedding and model. This is the only format without --out")
@pass_options(EmbedOptions)
def embed(ctx: click.Context, options: EmbedOptions) -> None:
    """Compute a vector for each text.

    A FILE has one text per line, or is a table (CSV, TSV), JSONL, JSON or Parquet with a field for the text; "-" is standard
    input. Vector N is that of line or record N: an empty text is <|endoftext|> alone. Of a text with more tokens than the
    model has positions, only the first ones are read, and a warning counts such texts.

    \b
    --out FILE.npy      the vectors: (texts, width) in float32, for numpy.load
    --out FILE.jsonl    an object per text: its other fields, text, embedding, model
    --out FILE.parquet  a row per text: its other fields, text, embedding
    """
    out = _checked_out(options)
    texts = list(_texts(options.file, options.text_field))
    if not texts:
        name = "standard input" if options.file == "-" else options.file
        raise InputError(f"{name} has no text: write one text per line")
    model, tokenizer, name = load_model_option(
        options.from_pretrained, device=options.device, dtype=options.dtype, tokenizer_name=options.model_name
    )
    from tqdm.auto import tqdm

    from gpt2.evaluation.embedding import embed_ids, text_ids

    source = "standard input" if options.file == "-" else options.file
    rows = [text_ids(model, tokenizer, item.text, f"{source}, {item.place}") for item in texts]
    bar = tqdm(total=len(rows), unit="text", file=sys.stderr, disable=None, leave=False)
    with wrong_options(), bar:
        vectors = embed_ids(
            model, rows, pooling=options.pooling, layer=options.layer, normalize=options.normalize,
            batch_size=options.batch_size, progress=bar.update,
        )  # fmt: skip
    if out is None:
        for line in _lines(texts, vectors, name):
            click.echo(line)
        return
    atomic_write(out, partial(_write, texts=texts, vectors=vectors, name=name))
    click.echo(f"{len(texts)} vectors of {vectors.shape[1]} numbers, in {out}", err=True)


def _checked_out(options: EmbedOptions) -> Path | None:
    """The file to write, if any, whose name says its format. Errors come before the model is loaded."""
    if options.out is None:
        return None
    out = Path(options.out)
    if options.as_json:
        raise click.UsageError("--json prints on stdout, and --out writes a file: leave one of them out")
    if out.suffix.lower() not in _SUFFIXES:
        raise click.UsageError(f"--out {options.out!r} must end in .npy, .jsonl or .parquet, which says the format")
    if out.is_dir():
        raise click.UsageError(f"--out {options.out} is a folder: name a file")
    if out.suffix.lower() == ".parquet":
        from gpt2.data.arrow import check_can_write

        check_can_write(out)
    return out


def _texts(file: str, text_field: str) -> Iterator[PlacedText]:
    from gpt2.data.source import Source
    from gpt2.data.texts import texts_of

    if file == "-" and sys.stdin is None:
        raise InputError("standard input is closed: give the name of a file")
    source = Source("standard input", sys.stdin.buffer.read()) if file == "-" else Source(file)
    return texts_of(source, text_field, partial(click.echo, err=True))


def _write(path: Path, texts: Sequence[PlacedText], vectors: Tensor, name: str) -> None:
    if path.suffix.lower() == ".npy":
        import numpy as np

        with open(path, "wb") as file:
            np.save(file, vectors.numpy())
    elif path.suffix.lower() == ".parquet":
        from gpt2.data.arrow import write_parquet

        records = [_beside(item, ("embedding",)) for item in texts]
        names = dict.fromkeys(name for record in records for name in record)
        columns = {name: [record.get(name) for record in records] for name in names}
        write_parquet(path, columns, "embedding", vectors.numpy())
    else:
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in _lines(texts, vectors, name))


def _lines(texts: Sequence[PlacedText], vectors: Tensor, name: str) -> Iterator[str]:
    """The JSON object of each text. Values of Parquet that JSON does not have, such as dates, become strings."""
    for item, vector in zip(texts, vectors, strict=True):
        values = {**_beside(item, ("embedding", "model")), "embedding": vector.tolist(), "model": name}
        yield to_json(values, default=str)


def _beside(item: PlacedText, own: tuple[str, ...]) -> dict[str, Any]:
    """The other fields of a text and the text. "input_" is added to names that the output has, too."""
    own = (*own, "text")
    return {f"input_{key}" if key in own else key: value for key, value in item.fields.items()} | {"text": item.text}
