"""`gpt2 evaluate`: read texts or the items of a task, call `gpt2.evaluation`, print the figures. It computes nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from gpt2.cli.classification_result import result_lines
from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.json_lines import json_line, json_option
from gpt2.cli.model_option import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, load_model_option
from gpt2.cli.option_sources import was_given
from gpt2.cli.options import Choice, Command, option, pass_options, revision_option, threads_option, wrong_options
from gpt_config.errors import DataError

if TYPE_CHECKING:
    from gpt2.evaluation.figures import Figure
    from gpt2.evaluation.perplexity import Evaluation
    from gpt2.finetuning.labels import Label
    from gpt2.pretrained import GPT2
    from gpt2.training.corpus import Corpus
    from gpt_encoder.interface import Tokenizer

_PERPLEXITY, _CLASSIFICATION = "perplexity", "classification"
_ONLY_PERPLEXITY = ("context", "stride", "detokenize", "text_field")
_ONLY_TASKS = ("limit", "per_item")
_ONLY_CLASSIFICATION = ("text_column", "label_column")


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
    text_column: str
    label_column: str
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
    type=Choice([_PERPLEXITY, _CLASSIFICATION, "lambada", "hellaswag", "multiple_choice"]),
    default=_PERPLEXITY,
    show_default=True,
    help="What to measure: see above.",
)
@_text("--context", type=int, help="Tokens of a window.  [default: all positions of the model]")
@_text("--stride", type=int, help="Tokens from window to window: fewer is slower, with more context.  [default: --context]")
@_text("--detokenize", type=Choice(["wikitext", "ptb"]), help="Undo this corpus's spacing, but count its words.")
@_text("--text_field", default="text", show_default=True, help="Field or column of JSON, CSV or Parquet with the text.")
@option("--text_column", group="Classification", default="text", show_default=True, help="Column or field of the text.")
@option("--label_column", group="Classification", default="label", show_default=True, help="Column or field of the label.")
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
                     CSV, Parquet, a folder of them, or token ids (.bin, .npy). Documents are
                     scored one after another, each with <|endoftext|> before it.
    classification   accuracy, macro F1 and confusion matrix of a run of gpt2 finetune --task
                     classification, on the files that it reads: CSV, TSV, JSONL, Parquet
    lambada          JSONL {"text"}: the last word, predicted from all words before it
    hellaswag        JSONL of Rowan Zellers' format, or with ctx in place of ctx_a and ctx_b
    multiple_choice  JSONL of context, choices and answer (also: query, gold, label), or of
                     context_options, continuation and gold
    """
    _check_options(ctx, options.task, options.files)
    if options.task == _PERPLEXITY:
        _evaluate_text(options)
    elif options.task == _CLASSIFICATION:
        _evaluate_classifier(options)
    else:
        _evaluate_task(options.files[0], options)


def _check_options(ctx: click.Context, task: str, files: tuple[str, ...]) -> None:
    only_others: tuple[str, ...] = () if task == _PERPLEXITY else _ONLY_PERPLEXITY
    only_others += _ONLY_TASKS if task in (_PERPLEXITY, _CLASSIFICATION) else ()
    only_others += () if task == _CLASSIFICATION else _ONLY_CLASSIFICATION
    only_others += () if task == "multiple_choice" else ("delimiter",)
    for name in only_others:
        if was_given(ctx, name):
            raise click.UsageError(f"--{name} has no meaning for the task {task}: leave it out, or choose another --task")
    if task not in (_PERPLEXITY, _CLASSIFICATION) and len(files) > 1:
        raise click.UsageError(f"the task {task} takes one file, not {len(files)}")


def _evaluate_text(options: EvaluateOptions) -> None:
    model, tokenizer, name = load_model_option(options.from_pretrained, device=options.device, dtype=options.dtype)
    from tqdm.auto import tqdm

    from gpt2.evaluation.perplexity import evaluate as evaluate_ids
    from gpt2.training.corpus import Corpus

    corpus, counts = Corpus(options.files, options.text_field), dict[str, int]()
    for line in corpus.listing().lines():
        click.echo(line, err=True)
    if corpus.holds_tokens():
        ids = _token_ids(corpus, tokenizer, model.config.vocab_size, counts)
    else:
        ids = _text_ids(corpus, tokenizer, model.config.vocab_size, options.detokenize, counts)
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


def _token_ids(corpus: Corpus, tokenizer: Tokenizer, vocab_size: int, counts: dict[str, int]) -> Iterator[int]:
    """The ids of files of token ids, one after another. `counts["bytes"]` is complete after the last id."""
    from gpt2.training.token_shards import bytes_of_ids, open_shard

    shards = [open_shard(path, corpus.kind(path)) for path in corpus.files()]
    for shard in shards:
        shard.check(vocab_size, "the model")
    sizes = bytes_of_ids(tokenizer.token_bytes, max(vocab_size, tokenizer.vocab_size), tokenizer.eot_token_id)
    counts["bytes"] = 0
    return _counted((ids for shard in shards for ids in shard.chunks()), sizes, counts)


def _counted(parts: Iterator[Any], sizes: Any, counts: dict[str, int]) -> Iterator[int]:
    for ids in parts:
        counts["bytes"] += int(sizes[ids].sum())
        yield from ids.tolist()


def _text_ids(
    corpus: Corpus, tokenizer: Tokenizer, vocab_size: int, spacing: str | None, counts: dict[str, int]
) -> Iterator[int]:
    """The ids of all documents, with an end-of-text token before each. `counts` is complete after the last id."""
    from gpt2.evaluation.detokenize import DETOKENIZERS, count_words
    from gpt2.weights.tokenizer import check_ids

    counts.update(bytes=0, words=0, replaced=0)
    separator = [] if tokenizer.eot_token_id is None else [tokenizer.eot_token_id]
    detokenize = DETOKENIZERS.get(spacing or "")
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


def _evaluate_classifier(options: EvaluateOptions) -> None:
    if options.from_pretrained is None:
        raise click.UsageError("the task classification needs a classifier: --from_pretrained FOLDER")
    from gpt2.weights.folder import locate_model

    locate_model(options.from_pretrained)
    from gpt2.data.source import Source
    from gpt2.finetuning.classification import encode_texts, measure
    from gpt2.finetuning.classifier_files import load_classifier
    from gpt2.finetuning.labelled import LabelledFiles
    from gpt2.finetuning.records import files_of
    from gpt2.weights.tokenizer import load_tokenizer_for

    classifier = load_classifier(options.from_pretrained, device=options.device, dtype=options.dtype)
    problem_type = classifier.problem_type or "single_label_classification"
    files = LabelledFiles(
        classifier.labels, problem_type, options.text_column, options.label_column, partial(click.echo, err=True)
    )
    texts: list[tuple[str, Label]] = []
    for path in files_of(options.files):
        for item in files.texts(Source(str(path))):
            if item.label is None:
                raise DataError(f"{path}, {item.place}: there is no label in {options.label_column!r}: name its column")
            if unknown := files.unknown(item.label):
                known = ", ".join(classifier.labels)
                raise DataError(f"{path}, {item.place}: the label {unknown!r} is none of the classifier's ({known:.200})")
            texts.append((item.text, item.label))
    if not texts:
        raise DataError(f"{options.files[0]} has no text: name a file with texts and labels")
    tokenizer = load_tokenizer_for(classifier.transformer)
    examples, n_cut = encode_texts(texts, classifier.labels, tokenizer, classifier.context)
    if n_cut:
        click.echo(f"warning: {n_cut} texts are cut to the {classifier.context} tokens of the training", err=True)
    result = measure(classifier, examples, options.batch_size).to_dict()
    if options.as_json:
        values = {"model": options.from_pretrained, "task": _CLASSIFICATION, "texts": len(texts), **result}
        click.echo(json_line(values))
        return
    for line in result_lines(result, f"{len(texts)} texts"):
        click.echo(line)


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
