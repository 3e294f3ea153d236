"""`gpt2 tokenize`: print the tokens of a text with their ids and bytes. `gpt_encoder` does the work."""

from __future__ import annotations

import click

from gpt2.cli.group import CONTEXT_SETTINGS, decode_argument, read_stdin
from gpt2.cli.json_lines import json_line, json_option
from gpt2.cli.options import Command


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("text")
@click.option(
    "--model_name", metavar="NAME", default="gpt2", show_default=True, help="A folder or hub name with a tokenizer."
)
@click.option("--allow_special", is_flag=True, help="Read <|endoftext|> and other special tokens as such, not as text.")
@json_option("one with ids, pieces, byte_spans and model (the tokenizer's name)")
def tokenize(text: str, model_name: str, allow_special: bool, as_json: bool) -> None:
    """Show the tokens of a text.

    A TEXT of "-" is standard input. Each line has an id, the token's place among the bytes of the UTF-8 text, and its text.
    Bytes that are not whole characters are written \\xNN.
    """
    text = read_stdin() if text == "-" else decode_argument(text, "the text")
    from gpt_encoder import load_tokenizer  # here, because `gpt2 --help` needs no tokenizer

    tokenizer = load_tokenizer(model_name)
    ids = tokenizer.encode(text, allowed_special="all" if allow_special else ())
    tokens = [tokenizer.decode_bytes([token]) for token in ids]
    spans, end = [], 0
    for token in tokens:
        spans.append((end, end + len(token)))
        end += len(token)
    if as_json:
        pieces = [token.decode("utf-8", errors="backslashreplace") for token in tokens]
        click.echo(json_line({"ids": ids, "pieces": pieces, "byte_spans": spans, "model": model_name}))
        return
    for token_id, (start, stop), token in zip(ids, spans, tokens, strict=True):
        click.echo(f"{token_id:>6}  {start:>6}-{stop:<6}  {_quoted(token)}")
    click.echo(f"{len(ids)} tokens, {end} bytes, {len(text)} characters", err=True)


def _quoted(token: bytes) -> str:
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)
