"""`gpt2 score`: print how surprising each token of a text is. It computes nothing: `gpt2.evaluation.token_scores` does."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2.cli.group import CONTEXT_SETTINGS, decode_utf8, read_stdin
from gpt2.cli.model_option import DTYPE_HELP, load_model_option
from gpt2.cli.options import Command, pass_options, threads_option, wrong_options
from gpt_config.errors import DataError

if TYPE_CHECKING:
    from gpt2.evaluation.token_scores import TokenScore, Totals

# Upper ends in bits, and colours of the terminal's palette of 256, all of which black text can be read on.
_COLOURS = ((1.0, 194), (3.0, 229), (6.0, 222), (10.0, 215), (math.inf, 210))
# Pictures of control characters: what moves a terminal's cursor is shown and not obeyed.
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


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--from_pretrained", metavar="NAME", help="A folder, a shipped model, or a hub name.  [default: gpt2]")
@click.option("--model_name", metavar="NAME", help="The tokenizer of another folder or model.  [default: the model's own]")
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "color"]),
    default="table",
    show_default=True,
    help="How to show it.",
)
@click.option("--context", type=int, help="Tokens in each window.  [default: all the model has positions for]")
@click.option("--stride", type=int, help="How far windows move on; less is slower, and kinder.  [default: a whole window]")
@click.option("--batch_size", type=int, default=8, show_default=True, help="Windows to run at once.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto.")
@click.option("--dtype", default="float32", show_default=True, help=DTYPE_HELP)
@threads_option
@pass_options(ScoreOptions)
def score(ctx: click.Context, options: ScoreOptions) -> None:
    """Show log-probability, surprisal in bits and rank of each token of FILEs, and what they come to.

    A FILE of "-" is standard input, without its last line end. The first token is predicted from <|endoftext|>. Rank 1 is
    the token that the model thought the most probable.
    """
    texts = [(file, read_stdin() if file == "-" else _read(file)) for file in options.files]
    model, tokenizer, _ = load_model_option(
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
        if options.style == "json":
            click.echo(json.dumps(_as_dict(name, scores, totals(scores)), ensure_ascii=False))
            continue
        if len(texts) > 1:
            click.echo(f"{'' if number == 0 else chr(10)}== {name}")
        _print_colours(scores, number == 0) if options.style == "color" else _print_table(scores)
        click.echo(_summary(totals(scores)))


def _read(file: str) -> str:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file} ({error.strerror}): check the path") from None
    return decode_utf8(content, file)


def _as_dict(name: str, scores: list[TokenScore], sums: Totals) -> dict[str, Any]:
    return {
        "source": name,
        "tokens": [
            {
                "id": score.id,
                "piece": score.piece.decode("utf-8", errors="backslashreplace"),
                "byte_span": [score.start, score.start + len(score.piece)],
                "log_prob": score.log_prob,
                "bits": score.bits,
                "rank": score.rank,
            }
            for score in scores
        ],
        "total": {
            "tokens": sums.n_tokens,
            "scored": sums.n_scored,
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
    """The token as a Python literal; of bytes, if it is not whole characters."""
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
    per_byte = "" if sums.bits_per_byte is None else f" ({sums.bits_per_byte:,.4f} a byte)"
    return (
        f"{words}, log p {sums.log_prob:,.4f}, {sums.bits:,.3f} bits{per_byte}, "
        f"perplexity {sums.perplexity:,.4f}, rank 1: {sums.n_rank_1}"
    )
