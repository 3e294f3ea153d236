"""`gpt2 evaluate`: read texts or the items of a task, call `gpt2.evaluation`, print the figures. It computes nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.json_lines import json_line, json_option
from gpt2.cli.model_option import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, load_model_option
from gpt2.cli.options import Choice, Command, option, pass_options, revision_option, threads_option, wrong_options
from gpt_config.errors import DataError

if TYPE_CHECKING:
    from gpt2.evaluation.figures import Figure
    from gpt2.evaluation.perplexity import Evaluation
    from gpt2.pretrained import GPT2
    from gpt_encoder.interface import Tokenizer

_PERPLEXITY = "perplexity"
_ONLY_PERPLEXITY = ("context", "stride", "detokenize", "text_field")
_ONLY_TASKS = ("limit", "per_item")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The options of `gpt2 evaluate`."""

    files: tuple[str, ...]
    from_pretrained: str | None
    task: str
    context: int | None
    stride: int | None
    batch_size: int
    detokenize: str | None
    text_field: str
    limit: int | None
    per_item: str | None
    delimiter: str
    device: str
    dtype: str
    as_json: bool


# Options under the headings of --help.
_what, _speed = partial(option, group="What to measure"), partial(option, group="Speed")
_text, _tasks = partial(option, group="Perplexity"), partial(option, group="Other tasks")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@_what("--from_pretrained", metavar="NAME", help=MODEL_HELP)
@revision_option("What to measure")
@_what(
    "--task",
    type=Choice([_PERPLEXITY, "lambada", "hellaswag", "multiple_choice"]),
    default=_PERPLEXITY,
    show_default=True,
    help="What to measure: see above.",
)
@_text("--context", type=int, help="Tokens of a window.  [default: all positions of the model]")
@_text("--stride", type=int, help="Tokens from window to window: fewer is slower, with more context.  [default: --context]")
@_text("--detokenize", type=Choice(["wikitext", "ptb"]), help="Undo this corpus's spacing, but count its words.")
@_text("--text_field", default="text", show_default=True, help="Field of a JSONL line that has the text.")
@_tasks("--limit", type=click.IntRange(1), help="Use the first N items only.  [default: all]")
@_tasks("--per_item", metavar="PATH", help="Write a JSON line per item; the same call resumes an interrupted run from it.")
@_tasks("--delimiter", default=" ", help="multiple_choice: text between context and choice.  [default: a space]")
@_speed("--batch_size", type=int, default=8, show_default=True, help="Windows or items to run at once.")
@threads_option("Speed")
@_speed("--device", default="auto", show_default=True, help=DEVICE_HELP)
@_speed("--dtype", default="float32", show_default=True, help=DTYPE_HELP)
@json_option("one with model, task and the figures; a figure of a task is an object of value, standard_error, interval_95")
@pass_options(EvaluateOptions)
def evaluate(ctx: click.Context, options: EvaluateOptions) -> None:
    """Measure perplexity on texts, or accuracy on a task.

    \b
    perplexity       loss, perplexity, bits per byte, accuracy of texts. A FILE is text, JSONL,
                     a folder of them, or a token file (.bin) of a training run. Documents are
                     scored one after another, each with <|endoftext|> before it.
    lambada          JSONL {"text"}: the last word, predicted from all words before it
    hellaswag        JSONL of Rowan Zellers' format, or with ctx in place of ctx_a and ctx_b
    multiple_choice  JSONL of context, choices and answer (also: query, gold, label), or of
                     context_options, continuation and gold
    """
    _check_options(ctx, options.task, options.files)
    if options.task == _PERPLEXITY:
        _evaluate_text(options)
    else:
        _evaluate_task(options.files[0], options)


def _check_options(ctx: click.Context, task: str, files: tuple[str, ...]) -> None:
    only_others: tuple[str, ...] = _ONLY_TASKS if task == _PERPLEXITY else _ONLY_PERPLEXITY
    only_others += () if task == "multiple_choice" else ("delimiter",)
    for name in only_others:
        if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} has no meaning for the task {task}: leave it out, or choose another --task")
    if task != _PERPLEXITY and len(files) > 1:
        raise click.UsageError(f"the task {task} takes one file, not {len(files)}")


def _evaluate_text(options: EvaluateOptions) -> None:
    model, tokenizer, name = load_model_option(options.from_pretrained, device=options.device, dtype=options.dtype)
    from tqdm.auto import tqdm

    from gpt2.evaluation.perplexity import evaluate as evaluate_ids

    counts: dict[str, int] = {}
    ids = _token_file(options.files, model.config.vocab_size, counts) or _text_ids(
        tokenizer, model.config.vocab_size, options, counts
    )
    bar = tqdm(unit="token", unit_scale=True, file=sys.stderr, disable=None, leave=False)
    with wrong_options(), bar:
        result = evaluate_ids(
            model,
            ids,
            context=options.context,
            stride=options.stride,
            batch_size=options.batch_size,
            progress=bar.update,
        )
    if counts.get("replaced"):
        click.echo(f"warning: {counts['replaced']} bytes of the text are not UTF-8: each became U+FFFD", err=True)
    _print_evaluation(result, counts, name, options.detokenize, options.as_json)


def _token_file(files: tuple[str, ...], vocab_size: int, counts: dict[str, int]) -> Iterator[int] | None:
    """The ids of a training run's token file, or None if the files are texts. Sets counts["bytes"]."""
    if not any(file.endswith(".bin") for file in files):
        return None
    if len(files) > 1:
        raise click.UsageError("a token file (.bin) must be the only FILE: name it alone, or texts")
    from gpt2.training.token_file import TokenFile

    file = TokenFile.open(files[0])
    if file.vocab_size > vocab_size and file.largest_id() >= vocab_size:
        raise DataError(f"{files[0]} has {file.vocab_size} token ids and the model {vocab_size}: name the model of that run")
    counts["bytes"] = file.n_bytes
    return (token for start in range(0, len(file), 1 << 16) for token in file.tokens[start : start + (1 << 16)].tolist())


def _text_ids(tokenizer: Tokenizer, vocab_size: int, options: EvaluateOptions, counts: dict[str, int]) -> Iterator[int]:
    """The ids of all documents, with an end-of-text token before each. `counts` is complete after the last id."""
    from gpt2.evaluation.detokenize import DETOKENIZERS, count_words
    from gpt2.training.corpus import Corpus
    from gpt2.weights.tokenizer import check_ids

    corpus = Corpus([Path(file) for file in options.files], options.text_field)
    counts.update(bytes=0, words=0, replaced=0)
    separator = [] if tokenizer.eot_token_id is None else [tokenizer.eot_token_id]
    detokenize = DETOKENIZERS.get(options.detokenize or "")
    begins = True
    for piece in corpus.pieces():
        counts["words"] += count_words(piece.text) if detokenize else len(piece.text.split())
        text = detokenize(piece.text) if detokenize else piece.text
        counts["bytes"] += len(text.encode("utf-8", errors="replace"))
        if begins:
            yield from separator
        ids = tokenizer.encode(text, add_special_tokens=False)
        check_ids(ids, tokenizer, vocab_size)
        yield from ids
        begins = piece.ends
    counts["replaced"] = corpus.replaced_bytes


def _print_evaluation(result: Evaluation, counts: dict[str, int], name: str, corpus: str | None, as_json: bool) -> None:
    from gpt2.evaluation.paper import rows_beside, table_beside

    result = replace(result, n_bytes=counts.get("bytes"), n_words=counts.get("words"))
    values: dict[str, Any] = {
        "model": name,
        "task": _PERPLEXITY,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "word_perplexity": result.word_perplexity,
        "accuracy": result.accuracy,
        "tokens": result.n_tokens,
        "bytes": result.n_bytes,
        "words": result.n_words,
    }
    if as_json:
        click.echo(json_line({**values, "paper": rows_beside(corpus)} if corpus else values))
        return
    for label, value in values.items():
        if value is not None:
            click.echo(f"{label:16}{value:,.4f}" if isinstance(value, float) else f"{label:16}{value}")
    if corpus:
        click.echo(f"\n{table_beside(corpus)}")


def _evaluate_task(file: str, options: EvaluateOptions) -> None:
    from gpt2.evaluation.items import read_items

    items = read_items(file, options.task, delimiter=options.delimiter)
    model, tokenizer, name = load_model_option(options.from_pretrained, device=options.device, dtype=options.dtype)
    from gpt2.evaluation.item_log import ItemLog, data_fingerprint, model_fingerprint
    from gpt2.evaluation.tasks import figures

    log = None
    if options.per_item is not None:
        identity = {"task": options.task, "model": model_fingerprint(model, tokenizer), "data": data_fingerprint(items)}
        log = ItemLog(options.per_item, identity)
    with wrong_options():
        records = _run(model, tokenizer, items[: options.limit], options.batch_size, log)
    _print_task(name, options.task, len(records), figures(records), options.as_json)


def _run(model: GPT2, tokenizer: Tokenizer, items: list[Any], batch_size: int, log: Any) -> list[dict[str, Any]]:
    from tqdm.auto import tqdm

    from gpt2.evaluation.tasks import figures, run_task

    bar = tqdm(total=len(items), unit="item", file=sys.stderr, disable=None, leave=False)

    def show(records: list[dict[str, Any]]) -> None:
        if records and not bar.disable:
            bar.set_postfix({figure.name: f"{figure.value:.4g}" for figure in figures(records)}, refresh=False)
            bar.update(len(records) - bar.n)

    with bar:
        return run_task(model, tokenizer, items, batch_size=batch_size, log=log, progress=show)


def _print_task(name: str, task: str, n_items: int, measured: list[Figure], as_json: bool) -> None:
    from gpt2.evaluation.paper import rows_beside, table_beside

    if as_json:
        values = {
            figure.name: {
                "value": figure.value,
                "standard_error": figure.standard_error,
                "interval_95": [figure.low, figure.high],
            }
            for figure in measured
        }
        click.echo(json_line({"model": name, "task": task, "items": n_items, **values, "paper": rows_beside(task)}))
        return
    click.echo(f"{'model':16}{name}\n{'task':16}{task}\n{'items':16}{n_items}\n")
    click.echo(f"{'':16}{'value':>14}{'std. error':>14}   95% interval")
    for figure in measured:
        row = f"{figure.name:16}{figure.value:14,.4f}"
        if figure.standard_error is not None:
            row += f" {figure.standard_error:13,.4f}"
        if figure.low is not None:
            row = f"{row:44}   {figure.low:,.4f} to {figure.high:,.4f}"
        click.echo(row)
    if beside := table_beside(task):
        click.echo(f"\n{beside}")
