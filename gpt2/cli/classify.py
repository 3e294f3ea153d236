"""`gpt2 classify`: read texts, call `gpt2.finetuning.classification`, print a JSON line for each. It computes nothing."""

from __future__ import annotations

import warnings
from itertools import islice
from pathlib import Path

import click

from gpt2.cli.group import CONTEXT_SETTINGS, decode_utf8, read_stdin
from gpt2.cli.json_lines import json_line, json_option
from gpt2.cli.model_option import DEVICE_HELP
from gpt2.cli.options import Command, threads_option
from gpt2.weights.folder import locate_model
from gpt_config.errors import GPT2Warning, InputError


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("file", metavar="FILE")
@click.option("--from_pretrained", required=True, metavar="FOLDER", help="A run of gpt2 finetune --task classification.")
@click.option("--batch_size", type=click.IntRange(min=1), default=32, show_default=True, help="Texts to run at once.")
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16, float16 or float64.")
@threads_option()
@json_option("one per text, with text, label, probabilities and model. This is the only format, also without --json")
def classify(file: str, from_pretrained: str, batch_size: int, device: str, dtype: str, as_json: bool) -> None:
    """Label each line of a text file with a fine-tuned classifier.

    A FILE of "-" is standard input. The output is a JSON object per line: text, label, and the probability of each label.
    Empty lines are skipped.

    A classifier with several labels per text, or with one label, gives each label a probability of its own; `labels` are
    those of 0.5 or more. A regression gives its values in place of probabilities.
    """
    text = read_stdin() if file == "-" else decode_utf8(Path(file).read_bytes(), file)
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{'standard input' if file == '-' else file} has no text: write one text per line")
    locate_model(from_pretrained)
    from gpt2.finetuning.classification import classify as classify_rows
    from gpt2.finetuning.classifier_files import load_classifier
    from gpt2.finetuning.label_results import THRESHOLD
    from gpt2.weights.tokenizer import check_ids, load_tokenizer_for

    classifier = load_classifier(from_pretrained, device=device, dtype=dtype)
    tokenizer = load_tokenizer_for(classifier.transformer)
    context, n_cut = classifier.context, 0
    waiting = iter(texts)
    while batch := list(islice(waiting, 16 * batch_size)):  # sorted by length together, for less padding
        rows = [tokenizer.encode(text) for text in batch]
        for ids in rows:
            check_ids(ids, tokenizer, classifier.transformer.config.vocab_size)
        n_cut += sum(len(row) > context for row in rows)
        results = dict(classify_rows(classifier, [row[:context] for row in rows], batch_size))
        for place, line in enumerate(batch):
            probabilities = dict(zip(classifier.labels, results[place], strict=True))
            values: dict[str, object] = {"text": line, "label": max(classifier.labels, key=probabilities.__getitem__)}
            if classifier.problem_type == "multi_label_classification":
                values["labels"] = [label for label, probability in probabilities.items() if probability >= THRESHOLD]
            values |= {"probabilities": probabilities, "model": from_pretrained}
            click.echo(json_line(values))
    if n_cut:
        warnings.warn(
            f"{n_cut} texts are longer than the {context} tokens that the model was trained on: they were cut",
            GPT2Warning,
            2,
        )
