"""`gpt2 finetune`: parse the options, call `gpt2.finetuning.run`, print the result. It trains nothing itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2.cli.classification_result import result_lines
from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.model_option import DEVICE_HELP, MODEL_HELP, default_model
from gpt2.cli.option_sources import outranks, was_given
from gpt2.cli.options import Command, option, pass_options, revision_option, threads_option
from gpt2.cli.resume_options import DATA, Change, options_of_run, write_run_file
from gpt2.cli.training_run import (
    RunOptions,
    check_fractions,
    check_new_rows,
    end_run,
    field_options,
    folder_options,
    read_task_options,
    report_options,
    report_threads,
    resume_run,
    shape_of_run,
    steady_stderr,
)
from gpt2.weights.folder import holds_model_files, locate_model
from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import DataError
from gpt_config.finetuning_config import PROBLEM_TYPES, TASKS, TOO_LONG, TRAINABLE, FinetuningConfig
from gpt_config.new_tokens import NEW_ROWS
from gpt_config.training_config import KEEP, PRECISIONS, SCHEDULES

if TYPE_CHECKING:
    from gpt2.training.task_scores import Task

_RUN_FILE = "finetuning.json"  # the options of a run, for --resume
_RESULT_FILE = "test.json"

# Heading: the help of each field of FinetuningConfig. Options are made from the fields, so that none can be forgotten.
_HELP = {
    "Task": {
        "task": "What to learn: see above.",
        "text_field": "text: field or column of JSONL, JSON, CSV or Parquet that has the text.",
        "special_tokens": "text: encode special tokens such as <|user|> in texts as tokens, not as ordinary text.",
        "problem_type": "classification: one label for each text, several, or a number.",
        "text_column": "classification: column or field of the text.",
        "label_column": "classification: column or field of the label.",
        "test_fraction": "classification: part of --data to test on at the end, from 0 to 1.",
        "balance": "classification: give every label the same weight.",
        "beta": "preference: how strongly to stay near the model of the start.",
        "template": "instruction, preference: default, plain, a JSON file, or a model's folder.",
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
        "schedule": "How the rate falls to a tenth: cosine, linear, wsd (in the last fifth), or constant (not at all).",
        "weight_decay": "AdamW: each step shrinks matrices by this share, times the learning rate.",
        "dropout": "Share of activations dropped in training.",
    },
    "What to train": {
        "add_tokens": "All but classification: new special tokens, with commas between them.",
        "new_rows": "Rows of the new tokens in the embedding: the mean of the others, or random.",
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
        "keep": "Model in the folder: best or last; both: the best, and the last in its folder last.",
        "patience": "End after this many evaluations in a row without a lower loss; 0 for never.",
        "sample_prompt": "text: prompt of the sample at each evaluation.  [default: none, a new text]",
        "sample_tokens": "Tokens of that sample; 0 for no sample.",
    },
}
_ONLY = {
    "text": ("sample_prompt", "text_field", "special_tokens"),
    "classification": ("problem_type", "text_column", "label_column", "test_fraction", "balance", "test_data"),
    "instruction": ("too_long",),
    "preference": ("beta",),
    "instruction preference": ("template",),
    "classification instruction preference": ("skip_bad",),
    "text classification instruction": ("dropout",),
    "text instruction preference": ("add_tokens", "new_rows", "eval_tasks", "eval_limit"),
}
_CHOICES = {
    "task": TASKS,
    "trainable": TRAINABLE,
    "too_long": TOO_LONG,
    "problem_type": PROBLEM_TYPES,
    "precision": PRECISIONS,
    "keep": KEEP,
    "schedule": SCHEDULES,
    "new_rows": NEW_ROWS,
}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions):
    """The options of `gpt2 finetune`. `config` has the fields of FinetuningConfig."""

    config: FinetuningConfig
    from_pretrained: str | None
    test_data: tuple[str, ...]
    labels: tuple[str, ...] = ()  # of a classifier: set when the run starts, kept in its file


# Options under the headings of --help.
_data = partial(option, group="Data and run")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@_data("--data", multiple=True, metavar="PATH", help="Files or folder to train on: see above.")
@_data("--validation_data", multiple=True, metavar="PATH", help="Validation data.  [default: a part of --data]")
@_data("--test_data", multiple=True, metavar="PATH", help="classification: test data.  [default: a part of --data]")
@_data("--from_pretrained", metavar="NAME", help=MODEL_HELP)
@revision_option("Data and run")
@folder_options("Data and run")
@field_options(FinetuningConfig, _HELP, _CHOICES)
@threads_option("Speed and memory")
@option("--device", group="Speed and memory", default="auto", show_default=True, help=DEVICE_HELP)
@report_options("Evaluation and output")
@pass_options(FinetuneOptions)
def finetune(ctx: click.Context, options: FinetuneOptions) -> None:
    """Fine-tune a pretrained model on a task.

    \b
    text            continue to train on texts: text, JSONL, CSV, Parquet, or a folder of them
    classification  labels or a number for each text, from CSV, TSV, JSONL ...; then gpt2 classify
    instruction     respond, from JSON or JSONL with instruction, input and output; prompt and
                    completion; prompt, thought and answer; or messages. Then gpt2 generate
                    --instruction
    preference      prefer one of two responses, from JSONL with prompt, chosen and rejected (DPO)

    The folder of --out is an ordinary model folder with the best model so far, or with --lora_rank the folder of an adapter.
    """
    folder, changes = options.run_folder(), list[Change]()
    if options.is_new:
        _check_new_run(ctx, folder, options)
        options = replace(options, from_pretrained=options.from_pretrained or default_model())
        # First, because torch takes seconds to import, and an unknown name is an error at once.
        locate_model(str(options.from_pretrained))
    else:
        _check_zero(ctx, options.config)
        options, changes = options_of_run(ctx, folder / _RUN_FILE, options)
    with steady_stderr():
        _run(folder, str(options.from_pretrained), options, changes, read_task_options(ctx, options))


def _check_new_run(ctx: click.Context, folder: Path, options: FinetuneOptions) -> None:
    if options.from_step is not None:
        raise click.UsageError("--step is for --resume: leave it out")
    if not options.data:
        raise click.UsageError("name the files to train on: --data PATH")
    if int(os.environ.get("RANK", 0)) == 0:  # only the first process: it may write before the others get here
        _check_is_free(folder)
    _check_meaning(ctx, options.config)
    _check_zero(ctx, options.config)
    check_fractions(ctx)
    check_new_rows(ctx, options.config.add_tokens)


def _check_zero(ctx: click.Context, config: FinetuningConfig) -> None:
    """UsageError for a 0 that was given, where 0 is the config's word for the default, and for steps beside passes."""
    for name in ("learning_rate", "max_steps", "context"):
        if was_given(ctx, name) and not getattr(config, name):
            raise click.UsageError(f"--{name}=0 must be above 0: leave it out for the default")
    if all(was_given(ctx, name) for name in ("epochs", "max_steps")) and not outranks(ctx, "max_steps", "epochs"):
        raise click.UsageError("--max_steps is instead of --epochs: leave one of them out")


def _check_meaning(ctx: click.Context, config: FinetuningConfig) -> None:
    """UsageError for an option that the task does not have."""
    for task, names in _ONLY.items():
        given = [name for name in names if was_given(ctx, name)]
        if given and config.task not in task.split():
            raise click.UsageError(f"--{given[0]} is for --task {' or '.join(task.split())}: leave it out")
    for name in ("lora_alpha", "lora_dropout"):
        if not config.lora_rank and was_given(ctx, name):
            raise click.UsageError(f"--{name} is for adapters: give --lora_rank too, or leave it out")


def _check_is_free(folder: Path) -> None:
    if (folder / _RUN_FILE).exists():
        raise click.UsageError(f"{folder} already contains a run: resume it with --resume {folder}, or choose another --out")
    if holds_model_files(folder):
        raise click.UsageError(f"{folder} contains a model, which the run would overwrite: choose another --out")


def _run(folder: Path, base: str, options: FinetuneOptions, changes: list[Change], tasks: list[Task]) -> None:
    from gpt2.finetuning.run import prepare_finetuning
    from gpt2.training.distributed import join_processes

    has_new_data = any(change.name in DATA for change in changes)
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
            logs=options.log,
            tasks=tasks,
            is_resumed=not options.is_new,
            has_new_data=has_new_data,
            shape=None if options.is_new else shape_of_run(folder),
        )
        if not options.is_new and not has_new_data and run.fingerprint != options.data_fingerprint:
            raise DataError(
                f"the data is not what the run in {folder} started with: name the files to go on with (--data PATH), or "
                "start a new run with --out"
            )
        if options.labels and options.labels != run.labels:
            raise DataError(
                f"the data has the labels {', '.join(run.labels)}, and the run in {folder} has {', '.join(options.labels)}: "
                "start a new run with --out"
            )
        options = replace(options, data_fingerprint=run.fingerprint, labels=run.labels)
        if options.is_new and processes.is_first:
            write_run_file(folder / _RUN_FILE, options)
        if not options.is_new:
            resume_run(run.trainer, folder / _RUN_FILE, options, changes)
        if processes.is_first:
            click.echo(f"{base}: {run.trainer.n_parameters:,} parameters are trained", err=True)
            for line in run.told:
                click.echo(line, err=True)
            report_threads(run.trainer.processes.device)
        stopped = run.trainer.train()
        if processes.is_first and stopped.signal is None:
            _print_result(run.finish(), folder)
    end_run(stopped, folder, processes, options.config.keep)


def _print_result(result: dict[str, Any], folder: Path) -> None:
    if not result:
        return
    atomic_write_json(folder / _RESULT_FILE, result)
    for line in result_lines(result, f"{result['texts']} {result['part']} texts"):
        click.echo(line)
