"""`gpt2 finetune`: parse the options, call `gpt2.finetuning.run`, print the result. It trains nothing itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.model_option import DEVICE_HELP, MODEL_HELP, default_model
from gpt2.cli.options import Command, option, pass_options, revision_option, threads_option
from gpt2.cli.training_run import (
    RunOptions,
    end_run,
    field_options,
    options_of_run,
    report_threads,
    resume_run,
    write_run_file,
)
from gpt2.weights.folder import holds_model_files, locate_model
from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import DataError
from gpt_config.finetuning_config import PROBLEM_TYPES, TASKS, TOO_LONG, TRAINABLE, FinetuningConfig
from gpt_config.training_config import PRECISIONS

_RUN_FILE = "finetuning.json"  # the options of a run, for --resume
_RESULT_FILE = "test.json"

# Heading: the help of each field of FinetuningConfig. Options are made from the fields, so that none can be forgotten.
_HELP = {
    "Task": {
        "task": "What to learn: see above.",
        "problem_type": "classification: one label for each text, several, or a number.",
        "text_column": "classification: column or field of the text.",
        "label_column": "classification: column or field of the label.",
        "test_fraction": "classification: part of --data to test on at the end, from 0 to 1.",
        "balance": "classification: give every label the same weight.",
        "template": "instruction: default, plain, a JSON file, or a model's folder.",
        "too_long": "instruction: cut examples that are longer than the context, or drop them.",
        "skip_bad": "Leave out rows that cannot be used, and count them, instead of ending with an error.",
    },
    "Batches and steps": {
        "epochs": "Passes through the data.",
        "max_steps": "Steps, instead of --epochs.  [default: the steps of --epochs]",
        "batch_size": "Rows of a step, over all processes together.",
        "context": "Tokens of a row at most.  [default: all positions of the model]",
        "seed": "Seed of splits, batches and dropout: the same seed gives the same run.",
    },
    "Optimizer": {
        "learning_rate": "Highest learning rate.  [default: depends on the task]",
        "weight_decay": "AdamW: each step shrinks matrices by this share, times the learning rate.",
        "dropout": "Share of activations dropped in training.",
    },
    "What to train": {
        "trainable": "Train all weights, or only the last block and the final norm.",
        "lora_rank": "Train LoRA adapters of this rank instead of weights; 0 for none.",
        "lora_alpha": "Scale of the adapters: their output is multiplied by alpha / rank.",
        "lora_dropout": "Share of the adapters' inputs dropped in training.",
    },
    "Speed and memory": {
        "precision": "Precision of matrix products; auto: bfloat16 if it is faster on this machine.",
        "accumulation": "Compute the rows of a step in this many parts: less memory.",
        "gradient_checkpointing": "Compute each layer twice: less memory, slower.",
    },
    "Evaluation and output": {
        "validation_fraction": "Part of --data to validate on, from 0 to 1.",
        "evaluations_per_epoch": "Evaluations on the validation data per pass.",
        "patience": "End after this many evaluations in a row without a lower loss; 0 for never.",
        "sample_prompt": "text: prompt of the sample at each evaluation.  [default: none, a new text]",
        "sample_tokens": "Tokens of that sample; 0 for no sample.",
    },
}
_ONLY = {
    "text": ("sample_prompt",),
    "classification": ("problem_type", "text_column", "label_column", "test_fraction", "balance", "test_data"),
    "instruction": ("template", "too_long"),
    "classification instruction": ("skip_bad",),
}
_CHOICES = {
    "task": TASKS,
    "trainable": TRAINABLE,
    "too_long": TOO_LONG,
    "problem_type": PROBLEM_TYPES,
    "precision": PRECISIONS,
}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions):
    """The options of `gpt2 finetune`. `config` has the fields of FinetuningConfig."""

    config: FinetuningConfig
    from_pretrained: str | None
    test_data: tuple[str, ...]


# Options under the headings of --help.
_data, _output = partial(option, group="Data and run"), partial(option, group="Evaluation and output")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@_data("--data", multiple=True, metavar="PATH", help="Files or folder to train on: see above.")
@_data("--validation_data", multiple=True, metavar="PATH", help="Validation data.  [default: a part of --data]")
@_data("--test_data", multiple=True, metavar="PATH", help="classification: test data.  [default: a part of --data]")
@_data("--from_pretrained", metavar="NAME", help=MODEL_HELP)
@revision_option("Data and run")
@_data("--out", metavar="FOLDER", help="New folder of the model, checkpoints and metrics.")
@_data("--resume", metavar="FOLDER", help="Resume the run in FOLDER, with the options it was started with.")
@_data("--step", "from_step", type=int, help="With --resume: the checkpoint of this step.  [default: the newest]")
@field_options(FinetuningConfig, _HELP, _CHOICES)
@threads_option("Speed and memory")
@option("--device", group="Speed and memory", default="auto", show_default=True, help=DEVICE_HELP)
@_output("--tensorboard", is_flag=True, help="Write metrics for TensorBoard too.")
@_output("--quiet", is_flag=True, help="Show no bar and no samples on the terminal.")
@pass_options(FinetuneOptions)
def finetune(ctx: click.Context, options: FinetuneOptions) -> None:
    """Fine-tune a pretrained model on a task.

    \b
    text            continue to train on texts: .txt, .jsonl, or a folder of them
    classification  labels or a number for each text, from CSV, TSV or JSONL; then gpt2 classify
    instruction     respond, from JSON or JSONL with instruction, input and output; prompt and
                    completion; prompt, thought and answer; or messages. Then gpt2 generate
                    --instruction

    The folder of --out is an ordinary model folder with the best model so far, or with --lora_rank the folder of an adapter.
    """
    folder = options.run_folder()
    if options.is_new:
        _check_new_run(ctx, folder, options)
        options = replace(options, from_pretrained=options.from_pretrained or default_model())
    else:
        options = options_of_run(ctx, folder / _RUN_FILE, options)
    base = str(options.from_pretrained)
    locate_model(base)  # first, because torch takes seconds to import, and an unknown name is an error at once
    _run(folder, base, options)


def _check_new_run(ctx: click.Context, folder: Path, options: FinetuneOptions) -> None:
    if options.from_step is not None:
        raise click.UsageError("--step is for --resume: leave it out")
    if not options.data:
        raise click.UsageError("name the files to train on: --data PATH")
    if int(os.environ.get("RANK", 0)) == 0:  # only the first process: it may write before the others get here
        _check_is_free(folder)
    _check_meaning(ctx, options.config)


def _check_meaning(ctx: click.Context, config: FinetuningConfig) -> None:
    """UsageError for an option that the task does not have."""
    for task, names in _ONLY.items():
        given = [name for name in names if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given and config.task not in task.split():
            raise click.UsageError(f"--{given[0]} is for --task {' or '.join(task.split())}: leave it out")
    for name in ("lora_alpha", "lora_dropout"):
        if not config.lora_rank and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} is for adapters: give --lora_rank too, or leave it out")


def _check_is_free(folder: Path) -> None:
    if (folder / _RUN_FILE).exists():
        raise click.UsageError(f"{folder} already contains a run: resume it with --resume {folder}, or choose another --out")
    if holds_model_files(folder):
        raise click.UsageError(f"{folder} contains a model, which the run would overwrite: choose another --out")


def _run(folder: Path, base: str, options: FinetuneOptions) -> None:
    from gpt2.finetuning.run import prepare_finetuning
    from gpt2.training.distributed import join_processes

    with join_processes(options.device) as processes:
        run = prepare_finetuning(
            base,
            options.data,
            options.config,
            folder,
            validation_data=options.validation_data,
            test_data=options.test_data,
            processes=processes,
            is_quiet=options.quiet,
            tensorboard=options.tensorboard,
            is_resumed=not options.is_new,
        )
        if options.is_new and processes.is_first:
            write_run_file(folder / _RUN_FILE, replace(options, data_fingerprint=run.fingerprint))
        elif not options.is_new and run.fingerprint != options.data_fingerprint:
            raise DataError(f"the data is not what the run in {folder} started with: start a new run with --out")
        if not options.is_new:
            resume_run(run.trainer, options.from_step)
        if processes.is_first:
            click.echo(f"{base}: {run.trainer.n_parameters:,} parameters are trained", err=True)
            for line in run.told:
                click.echo(line, err=True)
            report_threads(run.trainer.processes.device)
        stopped = run.trainer.train()
        if processes.is_first and stopped.signal is None:
            _print_result(run.finish(), folder)
    end_run(stopped, folder, processes)


def _print_result(result: dict[str, Any], folder: Path) -> None:
    if not result:
        return
    atomic_write_json(folder / _RESULT_FILE, result)
    if "confusion" not in result:
        _print_figures(result)
        return
    labels = result["labels"]
    width = max(8, *map(len, labels))
    click.echo(f"accuracy {result['accuracy']:.4f} on {result['texts']} {result['part']} texts")
    click.echo("texts by label (rows) and predicted label (columns):")
    click.echo(" " * width + "".join(f"  {label:>{width}}" for label in labels) + "        F1")
    for label, row in zip(labels, result["confusion"], strict=True):
        click.echo(f"{label:{width}}" + "".join(f"  {count:{width}}" for count in row) + f"    {result['f1'][label]:.4f}")


def _print_figures(result: dict[str, Any]) -> None:
    """Print the result of a classifier with several labels per text, or of a regression."""
    names = [name for name in ("accuracy", "micro_f1", "macro_f1", "mse", "mae", "r2") if result.get(name) is not None]
    figures = ", ".join(f"{name} {result[name]:.4f}" for name in names)
    click.echo(f"{figures} on {result['texts']} {result['part']} texts")
    for label, value in result.get("f1", {}).items():
        click.echo(f"F1 of {label}: {value:.4f}")
