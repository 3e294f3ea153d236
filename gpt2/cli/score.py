"""`gpt2 score`: print how surprising each token of a text is. It computes nothing: `gpt2.evaluation.token_scores` does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from gpt2.cli.group import CONTEXT_SETTINGS, read_stdin
from gpt2.cli.json_lines import json_line, json_option
from gpt2.cli.model_option import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, TOKENIZER_HELP, load_model_option
from gpt2.cli.option_sources import outranks, was_given
from gpt2.cli.options import Choice, Command, option, pass_options, revision_option, threads_option, wrong_options
from gpt_config.errors import DataError

if TYPE_CHECKING:
    from gpt2.evaluation.token_scores import TokenScore, Totals

# (upper limit in bits, colour of the terminal's palette of 256). Black text is readable on each of these colours.
_COLOURS = ((1.0, 194), (3.0, 229), (6.0, 222), (10.0, 215), (math.inf, 210))
# Visible characters in place of control characters, which would move the terminal's cursor.
_CONTROL = {code: chr(0x2400 + code) for code in range(32)} | dict.fromkeys(range(128, 160), "\ufffd") | {127: "\u2421"}


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """The options of `gpt2 score`."""

    files: tuple[str, ...]
    from_pretrained: str | None
    model_name: str | None
    style: str
    context: int | None
    stride: int | None
    batch_size: int
    device: str
    dtype: str
    as_json: bool


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@option("--from_pretrained", group="Model", metavar="NAME", help=MODEL_HELP)
@revision_option("Model")
@option("--model_name", group="Model", metavar="NAME", help=TOKENIZER_HELP)
@option(
    "--format",
    "style",
    type=Choice(["table", "json", "color"]),
    default="table",
    show_default=True,
    group="Output",
    help="A table, JSON (as --json), or the text with a colour for each token's surprisal.",
)
@option("--context", type=int, group="Windows", help="Tokens of a window.  [default: all positions of the model]")
@option(
    "--stride",
    type=int,
    group="Windows",
    help="Tokens from window to window: fewer is slower, with more context.  [default: --context]",
)
@option("--batch_size", type=int, default=8, show_default=True, group="Speed", help="Windows to run at once.")
@threads_option("Speed")
@option("--device", default="auto", show_default=True, group="Speed", help=DEVICE_HELP)
@option("--dtype", default="float32", show_default=True, group="Speed", help=DTYPE_HELP)
@json_option("one per FILE, with source, model, tokens (of each: id, piece, byte_span, logprob, bits, rank) and total")
@pass_options(ScoreOptions)
def score(ctx: click.Context, options: ScoreOptions) -> None:
    """Show log-probability, surprisal and rank of each token.

    A FILE is a text, or JSONL, CSV or Parquet with the field text, each document of which is scored alone. "-" is
    standard input, without its last line end. Surprisal is in bits. The first token is predicted from
    <|endoftext|>. Rank 1 is the most probable token. The totals of each FILE come last.
    """
    style = _style(ctx, options)
    texts = [text for file in options.files for text in ([(file, read_stdin())] if file == "-" else _read(file))]
    model, tokenizer, model_name = load_model_option(
        options.from_pretrained, device=options.device, dtype=options.dtype, tokenizer_name=options.model_name
    )
    from gpt2.evaluation.token_scores import score_tokens, totals

    if tokenizer.eot_token_id is None:
        click.echo("warning: the vocabulary has no <|endoftext|>: the first token is not scored", err=True)
    for number, (name, text) in enumerate(texts):
        with wrong_options():
            scores = score_tokens(
                model, tokenizer, text, context=options.context, stride=options.stride, batch_size=options.batch_size
            )
        if style == "json":
            click.echo(json_line(_as_dict(name, model_name, scores, totals(scores))))
            continue
        if len(texts) > 1:
            click.echo(f"{'' if number == 0 else chr(10)}== {name}")
        _print_colours(scores, number == 0) if style == "color" else _print_table(scores)
        click.echo(_summary(totals(scores)))


def _style(ctx: click.Context, options: ScoreOptions) -> str:
    """The format. UsageError if --json and --format ask for different ones."""
    if not options.as_json:
        return options.style
    if options.style != "json" and was_given(ctx, "style") and not outranks(ctx, "as_json", "style"):
        raise click.UsageError(f"--json is --format json: leave out --json or --format {options.style}")
    return "json"


def _read(file: str) -> list[tuple[str, str]]:
    """(Name, text) of a text file, or of each document of a file of records."""
    from gpt2.data.kind import TEXT, kind_of
    from gpt2.data.source import Source
    from gpt2.data.text import TextBlocks, replaced
    from gpt2.training.corpus import Corpus

    source = Source(file)
    kind = kind_of(source)
    if kind.name == TEXT:
        text, n_wrong = replaced("".join(TextBlocks(source, kind.encoding)))
        if n_wrong:
            raise DataError(f"{file} is not UTF-8 text ({n_wrong} of its bytes are not): convert it")
        return [(file, text)]
    found: list[tuple[str, str]] = []
    parts: list[str] = []
    for piece in Corpus([file]).pieces():
        parts.append(piece.text)
        if piece.ends:
            found.append((f"{file}, document {len(found) + 1}", "".join(parts)))
            parts = []
    return found


def _as_dict(name: str, model_name: str, scores: list[TokenScore], sums: Totals) -> dict[str, Any]:
    """The object of a text. `log_prob` is the older name of `logprob`."""
    return {
        "source": name,
        "model": model_name,
        "tokens": [
            {
                "id": score.id,
                "piece": score.piece.decode("utf-8", errors="backslashreplace"),
                "byte_span": [score.start, score.start + len(score.piece)],
                "logprob": score.log_prob,
                "log_prob": score.log_prob,
                "bits": score.bits,
                "rank": score.rank,
            }
            for score in scores
        ],
        "total": {
            "tokens": sums.n_tokens,
            "scored": sums.n_scored,
            "logprob": sums.log_prob,
            "log_prob": sums.log_prob,
            "bits": sums.bits,
            "bits_per_byte": sums.bits_per_byte,
            "perplexity": sums.perplexity,
            "rank_1": sums.n_rank_1,
        },
    }


def _print_table(scores: list[TokenScore]) -> None:
    click.echo(f"{'id':>6}  {'log p':>9}  {'bits':>7}  {'rank':>6}  token")
    for score in scores:
        figures = f"{'-':>9}  {'-':>7}  {'-':>6}"
        if score.log_prob is not None:
            figures = f"{score.log_prob:9.4f}  {score.bits:7.3f}  {score.rank:6}"
        click.echo(f"{score.id:>6}  {figures}  {_quoted(score.piece)}")


def _quoted(piece: bytes) -> str:
    """The token as a Python literal: of bytes if it is not whole characters."""
    try:
        return repr(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(piece)


def _print_colours(scores: list[TokenScore], with_legend: bool) -> None:
    from gpt2.evaluation.token_scores import whole_characters

    if with_legend:
        ends = ["1 bit or less", "to 3", "to 6", "to 10", "more"]
        click.echo(
            " ".join(_coloured(f" {end} ", colour) for end, (_, colour) in zip(ends, _COLOURS, strict=True)), color=True
        )
    line = ""
    for text, bits in whole_characters(scores):
        for part in text.splitlines(keepends=True):
            shown = part.removesuffix("\n").translate(_CONTROL) + ("\u21b5" if part.endswith("\n") else "")
            line += shown if bits is None else _coloured(shown, next(c for end, c in _COLOURS if bits <= end))
            line += "\n" if part.endswith("\n") else ""
    click.echo(line, color=True)


def _coloured(text: str, colour: int) -> str:
    return f"\x1b[48;5;{colour}m\x1b[38;5;16m{text}\x1b[0m"


def _summary(sums: Totals) -> str:
    words = f"{sums.n_tokens} tokens"
    if sums.n_scored < sums.n_tokens:
        words += f", {sums.n_scored} of them scored"
    if sums.perplexity is None:
        return words
    per_byte = "" if sums.bits_per_byte is None else f" ({sums.bits_per_byte:,.4f} per byte)"
    return (
        f"{words}, log p {sums.log_prob:,.4f}, {sums.bits:,.3f} bits{per_byte}, "
        f"perplexity {sums.perplexity:,.4f}, rank 1: {sums.n_rank_1}"
    )
