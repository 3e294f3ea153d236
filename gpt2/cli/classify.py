"""`gpt2 classify`: read texts, call `gpt2.finetuning.classification`, print a JSON line for each. It computes nothing."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import click

from gpt2.cli.classification_result import result_lines
from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.json_lines import json_line, json_option
from gpt2.cli.model_option import DEVICE_HELP
from gpt2.cli.options import Command, option, pass_options, threads_option
from gpt2.weights.folder import locate_model
from gpt_config.errors import GPT2Warning, InputError

if TYPE_CHECKING:
    from gpt2.data.source import Source
    from gpt2.finetuning.classifier import GPT2Classifier
    from gpt2.finetuning.labelled import TextToClassify
    from gpt_encoder.interface import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions:
    """The options of `gpt2 classify`."""

    file: str
    from_pretrained: str
    text_column: str
    label_column: str
    batch_size: int
    device: str
    dtype: str


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("file", metavar="FILE")
@option("--from_pretrained", required=True, metavar="FOLDER", help="A run of gpt2 finetune --task classification.")
@option("--text_column", default="text", show_default=True, help="Column or field of the text.")
@option("--label_column", default="label", show_default=True, help="Column or field of the label, if there is one.")
@option("--batch_size", type=click.IntRange(min=1), default=32, show_default=True, help="Texts to run at once.")
@option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@option("--dtype", default="float32", show_default=True, help="float32, bfloat16, float16 or float64.")
@threads_option()
@json_option("one per text, with text, label, probabilities and model. This is the only format, also without --json")
@pass_options(ClassifyOptions)
def classify(ctx: click.Context, options: ClassifyOptions) -> None:
    """Label each text of a file with a fine-tuned classifier.

    A FILE is a table (CSV, TSV), JSONL, JSON or Parquet with a column for the text, as gpt2 finetune reads it, or has one
    text per line; "-" is standard input. The output is a JSON object per line: text, label, and the probability of each
    label. Empty lines are skipped. If the file has labels, `actual` is the label of the file, and accuracy, macro F1 and the
    confusion matrix are printed on stderr.

    A classifier with several labels per text, or with one label, gives each label a probability of its own; `labels` are
    those of 0.5 or more. A regression gives its values in place of probabilities.
    """
    source = _source(options.file)
    locate_model(options.from_pretrained)
    from gpt2.finetuning.classification import result_of
    from gpt2.finetuning.classifier_files import load_classifier
    from gpt2.finetuning.labelled import LabelledFiles
    from gpt2.finetuning.labels import target_of
    from gpt2.weights.tokenizer import load_tokenizer_for

    classifier = load_classifier(options.from_pretrained, device=options.device, dtype=options.dtype)
    tokenizer = load_tokenizer_for(classifier.transformer)
    problem_type = classifier.problem_type or "single_label_classification"
    files = LabelledFiles(
        classifier.labels, problem_type, options.text_column, options.label_column, partial(click.echo, err=True)
    )
    targets, scores, unknown = [], [], ""
    for item, row in _classified(files.texts(source), classifier, tokenizer, options.batch_size, source.name):
        click.echo(json_line(_values(item, row, classifier, options.from_pretrained)))
        if item.label is None:
            continue
        if found := files.unknown(item.label):
            unknown = unknown or f"{item.place}: {found!r}"
        else:
            targets.append(target_of(item.label, classifier.labels))
            scores.append(row)
    if unknown:
        warnings.warn(
            f"{source.name} has labels that the classifier does not have ({unknown}): nothing is measured", GPT2Warning, 2
        )
    elif targets:
        for line in result_lines(result_of(classifier, targets, scores).to_dict(), f"{len(targets)} texts"):
            click.echo(line, err=True)


def _source(file: str) -> Source:
    from gpt2.data.source import Source

    if file != "-":
        return Source(file)
    if sys.stdin is None:
        raise InputError("standard input is closed: give the name of a file")
    return Source("standard input", sys.stdin.buffer.read())


def _classified(
    items: Iterator[TextToClassify], classifier: GPT2Classifier, tokenizer: Tokenizer, batch_size: int, name: str
) -> Iterator[tuple[TextToClassify, list[float]]]:
    """Yield each text with the scores of the labels, in the order of the file."""
    from gpt2.finetuning.classification import classify as classify_rows
    from gpt2.weights.tokenizer import check_ids

    context, n_cut = classifier.context, 0
    first = next(items, None)
    if first is None:
        raise InputError(f"{name} has no text: write one text per line")
    items = chain([first], items)
    while batch := list(islice(items, 16 * batch_size)):  # sorted by length together, for less padding
        rows = [tokenizer.encode(item.text) for item in batch]
        for ids in rows:
            check_ids(ids, tokenizer, classifier.transformer.config.vocab_size)
        n_cut += sum(len(row) > context for row in rows)
        results = dict(classify_rows(classifier, [row[:context] for row in rows], batch_size))
        yield from ((item, results[place]) for place, item in enumerate(batch))
    if n_cut:
        warnings.warn(
            f"{n_cut} texts are longer than the {context} tokens that the model was trained on: they were cut",
            GPT2Warning,
            2,
        )


def _values(item: TextToClassify, row: list[float], classifier: GPT2Classifier, name: str) -> dict[str, Any]:
    from gpt2.finetuning.label_results import THRESHOLD

    probabilities = dict(zip(classifier.labels, row, strict=True))
    values: dict[str, Any] = {"text": item.text, "label": max(classifier.labels, key=probabilities.__getitem__)}
    if classifier.problem_type == "multi_label_classification":
        values["labels"] = [label for label, probability in probabilities.items() if probability >= THRESHOLD]
    if item.label is not None:
        values["actual"] = item.label
    return values | {"probabilities": probabilities, "model": name}
