"""`gpt2 finetune`: parse the options, call `gpt2.finetuning.run`, say what came of it. It trains nothing itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.model_option import default_model
from gpt2.cli.options import Command, pass_options, threads_option
from gpt2.cli.training_run import RunOptions, end_run, field_options, go_on, options_of_run, write_run_file
from gpt2.weights.folder import holds_model_files, locate_model
from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import DataError
from gpt_config.finetuning_config import TASKS, TOO_LONG, TRAINABLE, FinetuningConfig
from gpt_config.training_config import PRECISIONS

_RUN_FILE = "finetuning.json"  # the options of a run, for --resume
_RESULT_FILE = "test.json"

# Field of FinetuningConfig: its help. Options are made from the fields, so that none can be forgotten.
_HELP = {
    "task": "What to learn.",
    "epochs": "How often to go through the data.",
    "max_steps": "Steps instead of epochs.  [default: as many as the epochs take]",
    "batch_size": "Rows in each step.",
    "context": "Tokens in each row at most.  [default: all the model has positions for]",
    "learning_rate": "The highest learning rate.  [default: one for the task]",
    "weight_decay": "How much matrices shrink in each step, times the learning rate.",
    "dropout": "Share of activations that are dropped in training.",
    "patience": "End after so many evaluations in a row without a better loss; 0 never.",
    "evaluations_per_epoch": "How often to measure on validation data.",
    "validation_fraction": "How much of --data to measure on.",
    "seed": "Of splits, batches and dropout: one seed, one run.",
    "trainable": "Train all weights, or the last block and the norm behind it.",
    "lora_rank": "Train adapters of this rank instead of weights; 0 none.",
    "lora_alpha": "How much adapters count: alpha over rank.",
    "lora_dropout": "Dropout before the adapters.",
    "text_column": "classification: the column or field of the text.",
    "label_column": "classification: the column or field of the label.",
    "test_fraction": "classification: how much of --data to test on at the end.",
    "balance": "classification: let every label weigh as much as any other.",
    "template": "instruction: default, plain, a JSON file, or a model's folder.",
    "too_long": "instruction: cut examples that are longer than the context, or drop them.",
    "precision": "Of the matrix products; auto is bfloat16 where the machine gains from it.",
    "accumulation": "Do the rows of a step in so many parts, to save memory.",
    "gradient_checkpointing": "Save memory: compute each layer twice.",
    "skip_bad": "Leave out rows that cannot be used, and count them.",
    "sample_prompt": "text: what the sample at each evaluation begins with.  [default: a new text]",
    "sample_tokens": "Tokens of each sample; 0 makes none.",
}
_ONLY = {
    "text": ("sample_prompt",),
    "classification": ("text_column", "label_column", "test_fraction", "balance", "test_data"),
    "instruction": ("template", "too_long"),
    "classification instruction": ("skip_bad",),
}
_CHOICES = {"task": TASKS, "trainable": TRAINABLE, "too_long": TOO_LONG, "precision": PRECISIONS}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions):
    """The options of `gpt2 finetune`. `config` has those that are fields of FinetuningConfig."""

    config: FinetuningConfig
    from_pretrained: str | None
    test_data: tuple[str, ...]


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.option("--data", multiple=True, metavar="PATH", help="What to learn from: see above.")
@click.option("--validation_data", multiple=True, metavar="PATH", help="Files to measure on.  [default: a part of --data]")
@click.option("--test_data", multiple=True, metavar="PATH", help="classification: files to test on.  [default: a part]")
@click.option("--from_pretrained", metavar="NAME", help="A folder, a shipped model, or a hub name.  [default: gpt2]")
@click.option("--out", metavar="FOLDER", help="Where the model, checkpoints and metrics go.")
@click.option("--resume", metavar="FOLDER", help="Go on with the run in FOLDER, with the options it was started with.")
@click.option(
    "--step", "from_step", type=int, help="With --resume: from the checkpoint of this step.  [default: the newest]"
)
@field_options(FinetuningConfig, _HELP, _CHOICES)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto.")
@click.option("--tensorboard", is_flag=True, help="Write metrics for TensorBoard too.")
@click.option("--quiet", is_flag=True, help="No bar and no samples on the terminal.")
@threads_option
@pass_options(FinetuneOptions)
def finetune(ctx: click.Context, options: FinetuneOptions) -> None:
    """Put a pretrained model to a task.

    --task text: go on learning from texts (.txt, .jsonl, a folder). --task classification: a label for each text, from CSV,
    TSV or JSONL; gpt2 classify uses what comes of it. --task instruction: respond, from JSON or JSONL with instruction,
    input and output, prompt and completion, prompt, thought and answer, or messages; ask it with gpt2 generate
    --instruction.

    FOLDER becomes an ordinary model folder with the best model so far, or an adapter's with --lora_rank.
    """
    folder = options.run_folder()
    if options.is_new:
        _check_new_run(ctx, folder, options)
        options = replace(options, from_pretrained=options.from_pretrained or default_model())
    else:
        options = options_of_run(ctx, folder / _RUN_FILE, options)
    base = str(options.from_pretrained)
    locate_model(base)  # before torch is imported, which takes longer than to say that it is not there
    _run(folder, base, options)


def _check_new_run(ctx: click.Context, folder: Path, options: FinetuneOptions) -> None:
    if options.from_step is not None:
        raise click.UsageError("--step is for --resume")
    if not options.data:
        raise click.UsageError("name the files to learn from: --data PATH")
    if int(os.environ.get("RANK", 0)) == 0:  # the first process alone: others may come when it has begun to write
        _check_is_free(folder)
    _check_meaning(ctx, options.config)


def _check_meaning(ctx: click.Context, config: FinetuningConfig) -> None:
    """An option that another task has is a mistake, and not to be passed over."""
    for task, names in _ONLY.items():
        given = [name for name in names if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given and config.task not in task.split():
            raise click.UsageError(f"--{given[0]} is for --task {' or '.join(task.split())}: leave it out")
    for name in ("lora_alpha", "lora_dropout"):
        if not config.lora_rank and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} is for adapters: give --lora_rank too, or leave it out")


def _check_is_free(folder: Path) -> None:
    if (folder / _RUN_FILE).exists():
        raise click.UsageError(f"{folder} holds a run already: go on with --resume {folder}, or choose another --out")
    if holds_model_files(folder):
        raise click.UsageError(f"{folder} holds a model, which the run would overwrite: choose another --out")


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
            raise DataError(f"the data is not what the run in {folder} began with: start a new one with --out")
        if not options.is_new:
            go_on(run.trainer, options.from_step)
        if processes.is_first:
            click.echo(f"{base}: {run.trainer.n_parameters:,} parameters learn", err=True)
            for line in run.told:
                click.echo(line, err=True)
        stopped = run.trainer.train()
        if processes.is_first and stopped.signal is None:
            _tell(run.finish(), folder)
    end_run(stopped, folder, processes)


def _tell(result: dict[str, Any], folder: Path) -> None:
    if not result:
        return
    atomic_write_json(folder / _RESULT_FILE, result)
    labels = result["labels"]
    width = max(8, *map(len, labels))
    click.echo(f"accuracy {result['accuracy']:.4f} on {result['texts']} {result['part']} texts")
    click.echo("the right label below, and beside it what it was taken for:")
    click.echo(" " * width + "".join(f"  {label:>{width}}" for label in labels) + "        F1")
    for label, row in zip(labels, result["confusion"], strict=True):
        click.echo(f"{label:{width}}" + "".join(f"  {count:{width}}" for count in row) + f"    {result['f1'][label]:.4f}")
