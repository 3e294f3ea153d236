"""`gpt2 evaluate`: read texts, call `gpt2.evaluation`, print the figures. It computes nothing itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.model_option import load_model_option
from gpt_config.errors import ConfigError, DataError

if TYPE_CHECKING:
    from gpt2.evaluation.perplexity import Evaluation
    from gpt_encoder.interface import Tokenizer


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--from_pretrained", metavar="NAME", help="A folder, a shipped model, or a hub name.  [default: gpt2]")
@click.option("--context", type=int, help="Tokens in each window.  [default: all the model has positions for]")
@click.option("--stride", type=int, help="How far windows move on; less is slower, and kinder.  [default: a whole window]")
@click.option("--batch_size", type=int, default=8, show_default=True, help="Windows to run at once.")
@click.option("--detokenize", type=click.Choice(["wikitext"]), help="Undo this corpus's blanks; count words as before.")
@click.option("--text_field", default="text", show_default=True, help="The field of a JSONL line that holds the text.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto.")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16, float16 or float64.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(files: tuple[str, ...], from_pretrained: str | None, as_json: bool, **options: Any) -> None:
    """Measure how well a model predicts the text in FILEs: loss, perplexity, bits per byte, accuracy.

    A FILE is text, JSONL, a folder of them, or a token file (.bin) of a training run. Documents are scored one behind the
    other, with an end of text before each.
    """
    model, tokenizer, name = load_model_option(from_pretrained, device=options["device"], dtype=options["dtype"])
    from tqdm import tqdm

    from gpt2.evaluation.perplexity import evaluate as evaluate_ids

    counts: dict[str, int] = {}
    ids = _token_file(files, model.config.vocab_size, counts) or _text_ids(files, tokenizer, options, counts)
    bar = tqdm(unit="token", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)
    try:
        with bar:
            result = evaluate_ids(
                model,
                ids,
                context=options["context"],
                stride=options["stride"],
                batch_size=options["batch_size"],
                progress=bar.update,
            )
    except ConfigError as error:
        raise click.UsageError(f"--{error}") from None
    _print(result, counts, name, as_json)


def _token_file(files: tuple[str, ...], vocab_size: int, counts: dict[str, int]) -> Iterator[int] | None:
    """The ids of a file that a training run made, or None if the files are texts."""
    if not any(file.endswith(".bin") for file in files):
        return None
    if len(files) > 1:
        raise click.UsageError("name one token file (.bin), or texts")
    from gpt2.training.token_file import TokenFile

    file = TokenFile.open(files[0])
    if file.vocab_size > vocab_size:
        raise DataError(f"{files[0]} has {file.vocab_size} token ids and the model {vocab_size}: name its own model")
    counts["bytes"] = file.n_bytes
    return (token for start in range(0, len(file), 1 << 16) for token in file.tokens[start : start + (1 << 16)].tolist())


def _text_ids(
    files: tuple[str, ...], tokenizer: Tokenizer, options: dict[str, Any], counts: dict[str, int]
) -> Iterator[int]:
    """The ids of all documents, an end of text before each; what is counted on the way is complete when they are."""
    from gpt2.evaluation.detokenize import count_words, detokenize_wikitext
    from gpt2.training.corpus import Corpus

    corpus = Corpus([Path(file) for file in files], options["text_field"])
    counts.update(bytes=0, words=0, replaced=0)
    separator = [] if tokenizer.eot_token_id is None else [tokenizer.eot_token_id]
    begins = True
    for piece in corpus.pieces():
        counts["words"] += count_words(piece.text) if options["detokenize"] else len(piece.text.split())
        text = detokenize_wikitext(piece.text) if options["detokenize"] else piece.text
        counts["bytes"] += len(text.encode("utf-8", errors="replace"))
        if begins:
            yield from separator
        yield from tokenizer.encode(text)
        begins = piece.ends
    counts["replaced"] = corpus.replaced_bytes


def _print(result: Evaluation, counts: dict[str, int], name: str, as_json: bool) -> None:
    import dataclasses

    result = dataclasses.replace(result, n_bytes=counts.get("bytes"), n_words=counts.get("words"))
    values = {
        "model": name,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "word_perplexity": result.word_perplexity,
        "accuracy": result.accuracy,
        "tokens": result.n_tokens,
        "bytes": result.n_bytes,
        "words": result.n_words,
    }
    if counts.get("replaced"):
        click.echo(f"warning: {counts['replaced']} bytes of the text are not UTF-8: each became U+FFFD", err=True)
    if as_json:
        click.echo(json.dumps(values))
        return
    for label, value in values.items():
        if value is not None:
            click.echo(f"{label:16}{value:,.4f}" if isinstance(value, float) else f"{label:16}{value}")
