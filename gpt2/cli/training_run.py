"""What the commands that train share: options from a config, the start of a run, and its end. It does not know them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import click

from gpt2.cli.option_sources import outranks, was_given
from gpt2.cli.options import Choice, NewTokens, option, options_together, values_of, wrong_options
from gpt2.cli.resume_options import DATA, Change, write_changes
from gpt_config.errors import GPT2Warning, InputError
from gpt_config.model_config import GPT2Config

if TYPE_CHECKING:
    import torch

    from gpt2.training.distributed import Processes
    from gpt2.training.loop import Stopped, TrainingLoop
    from gpt2.training.task_scores import Task

# What to say if the validation loss was never lower than before the first step, by the option --keep.
_NOTHING_LEARNED = {
    "best": "no step improved on the model before the first step: {folder} has that model, unchanged; lower "
    "--learning_rate, or keep the last weights with --keep last",
    "last": "no step improved on the model before the first step: {folder} has the last model all the same (--keep last)",
    "both": "no step improved on the model before the first step: {folder} has that model, unchanged, and {folder}/last the "
    "last one",
}
_MAY_BE_EMPTY = ("sample_prompt", "text_field", "text_column", "label_column", "data_fingerprint")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of every command that trains, except those on how to train."""

    data: tuple[str, ...]
    validation_data: tuple[str, ...]
    out: str | None
    resume: str | None
    from_step: int | None
    device: str
    tensorboard: bool
    log: tuple[str, ...]
    eval_tasks: tuple[str, ...]
    eval_limit: int
    quiet: bool
    data_fingerprint: str = ""  # of the run's data: set when it starts, kept in its file

    @property
    def is_new(self) -> bool:
        """Whether this starts a run, and does not resume one."""
        return self.resume is None

    def run_folder(self) -> Path:
        """The run's folder. UsageError unless one of --out and --resume names it, or if an option is an empty text.

        An empty text would mean the working directory, or be taken for an option that was not given.
        """
        for name, value in values_of(self).items():
            if name not in _MAY_BE_EMPTY and (value == "" or (isinstance(value, tuple) and "" in value)):
                raise click.UsageError(f'--{name} "" is empty: give a name, or leave it out')
        ctx = click.get_current_context(silent=True)
        if ctx and self.out and self.resume and outranks(ctx, "resume", "out"):
            return Path(self.resume)  # the folder of --out is that of a file or variable, with which the run was started
        if (self.out is None) == (self.resume is None):
            raise click.UsageError("give either --out FOLDER to start a run, or --resume FOLDER to resume one")
        return Path(str(self.resume or self.out))


def folder_options(group: str) -> Callable[[Any], Any]:
    """The options --out, --resume and --step, listed by --help under the heading `group`."""
    return options_together(
        option("--out", group=group, metavar="FOLDER", help="New folder of the model, checkpoints and metrics."),
        option(
            "--resume",
            group=group,
            metavar="FOLDER",
            help="Resume the run in FOLDER, with its options and the changes given here.",
        ),
        option(
            "--step",
            "from_step",
            group=group,
            type=click.IntRange(min=0),
            help="With --resume: the checkpoint of this step.  [default: the newest]",
        ),
    )


class _Listed(click.ParamType[tuple[str, ...]]):
    """Texts with commas between them, as a tuple."""

    name = "text,text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The texts; those of a tuple stay as they are."""
        if isinstance(value, tuple):
            return value
        texts = [text.strip() for text in value.split(",")] if value else []
        if "" in texts:
            self.fail(f"{value!r} has a comma with nothing on one side: remove it", param, ctx)
        return tuple(map(self._one, texts))

    def _one(self, text: str) -> str:
        return text


class _TaskFiles(_Listed):
    """Tasks as TASK=FILE or TASK, whose file is TASK.jsonl. Paths are in full: a run may be resumed from another folder."""

    name = "task=file,task"

    def _one(self, text: str) -> str:
        name, _, file = (part.strip() for part in text.partition("="))
        return f"{name}={Path(file or f'{name}.jsonl').resolve()}"


def report_options(group: str) -> Callable[[Any], Any]:
    """The options on what a run reports, listed by --help under the heading `group`."""
    return options_together(
        option(
            "--eval_tasks",
            group=group,
            type=_TaskFiles(),
            default=(),
            metavar="TASK=FILE,...",
            help="Score these tasks of gpt2 evaluate at each evaluation. Without =FILE: TASK.jsonl.",
        ),
        option(
            "--eval_limit",
            group=group,
            type=click.IntRange(1),
            default=100,
            show_default=True,
            help="Use the first N items of each task only.",
        ),
        option(
            "--log",
            group=group,
            type=_Listed(),
            default=(),
            metavar="LOG,...",
            help="Where metrics go besides metrics.jsonl: tensorboard, wandb.",
        ),
        option("--tensorboard", group=group, is_flag=True, help="Write metrics for TensorBoard too."),
        option("--quiet", group=group, is_flag=True, help="Show no bar and no samples on the terminal."),
    )


def read_task_options(ctx: click.Context, options: RunOptions) -> list[Task]:
    """The tasks to score at each evaluation. One line, before anything is computed, for a wrong name, file or log."""
    from gpt2.training.task_scores import read_tasks

    if not options.eval_tasks and was_given(ctx, "eval_limit"):
        raise click.UsageError("--eval_limit is for --eval_tasks: give them, or leave it out")
    with wrong_options():
        _check_logs(options.log, "--log=")
        _check_logs(("tensorboard",) if options.tensorboard else (), "--")
        return read_tasks(options.eval_tasks, options.eval_limit)


def _check_logs(names: Sequence[str], option_before: str) -> None:
    """Like `check_logs`. The message names the option, which is `option_before` and the name, not the library's argument."""
    from gpt2.training.run_logs import check_logs

    try:
        check_logs(names)
    except InputError as error:
        raise InputError(option_before + str(error).removeprefix("log=")) from None


def field_options(
    config: type, helps: Mapping[str, Mapping[str, str]], choices: Mapping[str, Sequence[str]]
) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """An option for each field of a config, so that none can be forgotten.

    `helps` has, by heading, the help of each field. The default is shown unless the help names one itself.
    """
    headings = {name: heading for heading, texts in helps.items() for name in texts}
    hints = get_type_hints(config)

    def decorate(command: click.decorators.FC) -> click.decorators.FC:
        for field in reversed(dataclasses.fields(config)):
            heading = headings[field.name]
            text = helps[heading][field.name]
            kind: dict[str, Any] = {"default": field.default, "show_default": "[default:" not in text}
            if isinstance(field.default, bool):
                kind = {"is_flag": True, "default": False}
            elif get_origin(hints[field.name]) is tuple:
                kind = {"type": NewTokens(), "default": (), "metavar": "TOKEN,..."}
            elif field.name in choices:
                kind["type"] = Choice(choices[field.name])
            else:
                hint = hints[field.name]
                kind["type"] = next((arg for arg in get_args(hint) if arg is not NoneType), hint)
            command = option(f"--{field.name}", group=heading, help=text, **kind)(command)
        return command

    return decorate


def check_fractions(ctx: click.Context) -> None:
    """UsageError for a part of --data to hold out, where files are named in its place."""
    for part in ("validation", "test"):
        if all(was_given(ctx, f"{part}_{kind}") for kind in ("fraction", "data")):
            raise click.UsageError(f"--{part}_fraction has no meaning with --{part}_data: leave one of them out")


def check_schedule(ctx: click.Context, schedule: str) -> None:
    """UsageError for a setting of the learning rate that `schedule` does not have."""
    only_wsd, lowest = ("decay_steps", "decay_shape"), ("min_learning_rate", "min_learning_rate_share")
    for names, others in ((only_wsd, schedule != "wsd"), (lowest, schedule == "constant")):
        given = [name for name in names if others and was_given(ctx, name)]
        if given:
            raise click.UsageError(f"--{given[0]} has no meaning with --schedule {schedule}: leave it out")


def check_new_rows(ctx: click.Context, tokens: Sequence[str]) -> None:
    """UsageError for --new_rows without new tokens."""
    if was_given(ctx, "new_rows") and not tokens:
        raise click.UsageError("--new_rows is for the tokens of --add_tokens: give them, or leave it out")


def shape_of_run(folder: Path) -> GPT2Config | None:
    """The shape of the model of a run that has a checkpoint, which has all weights; None if the base model is needed."""
    from gpt2.training.checkpoint import list_checkpoints
    from gpt2.training.loop import CHECKPOINT_FOLDER, SHAPE_FILE

    if not list_checkpoints(folder / CHECKPOINT_FOLDER) or not (folder / SHAPE_FILE).is_file():
        return None
    return GPT2Config.from_json_file(folder / SHAPE_FILE)


def resume_run(trainer: TrainingLoop, run_file: Path, options: RunOptions, changes: list[Change]) -> None:
    """Load the newest checkpoint, or that of a step; print the changed options, and keep them in `run_file`.

    A run that ended before its first checkpoint starts again.
    """
    from gpt2.training.checkpoint import list_checkpoints
    from gpt2.training.loop import CHECKPOINT_FOLDER

    if options.from_step is None and not list_checkpoints(trainer.folder / CHECKPOINT_FOLDER):
        warnings.warn(f"the run in {trainer.folder} ended before its first checkpoint: it starts again", GPT2Warning, 2)
    else:
        trainer.load(options.from_step)
    is_measured_again = any(change.name in (*DATA, "eval_batches") for change in changes)
    dropped = None
    if changes or options.from_step is not None:
        dropped = _better_later_step(trainer) if trainer.processes.is_first else None
        is_measured_again = trainer.processes.any(is_measured_again or dropped is not None)
    if is_measured_again:
        trainer.forget_best()
    if trainer.step >= trainer.config.max_steps:
        warnings.warn(f"this run has already done all of its {trainer.step} steps", GPT2Warning, 2)
    if changes and trainer.processes.is_first:
        for change in changes:
            click.echo(f"resumed at step {trainer.step}: {change}", err=True)
        write_changes(run_file, options, changes, trainer.step)
    if trainer.processes.is_first and dropped is not None:
        click.echo(f"the best model was that of step {dropped}, which is dropped: it is replaced by a new one", err=True)
    if trainer.processes.is_first and is_measured_again:
        click.echo("the validation loss is measured again, and later losses are compared with that one", err=True)


def _better_later_step(trainer: TrainingLoop) -> int | None:
    """The best step after the one that the run resumes at, if it was better than all before: its model is in the folder."""
    from gpt2.training.run_logs import read_metrics

    losses = [(line.get("validation_loss"), line["step"]) for line in read_metrics(trainer.folder)]
    later = [(loss, step) for loss, step in losses if isinstance(loss, int | float) and step > trainer.step]
    loss, step = min(later, default=(trainer.best_loss, 0))
    return step if loss < trainer.best_loss else None


def report_threads(device: torch.device) -> None:
    """Print how many threads compute and why. With a fixed number, two runs agree to the last bit on every processor."""
    from gpt2.fast.threads import thread_report

    if device.type == "cpu":
        click.echo(f"computing on cpu, {thread_report()}", err=True)


def end_run(stopped: Stopped, folder: Path, processes: Processes, keep: str) -> None:
    """Print how a run ended, and whether no step was better than none.

    After a signal, exit with the signal's status; several processes exit without exit handlers.
    """
    from gpt2.training.distributed import leave_at_once

    if processes.is_first:
        if stopped.best_step == 0 and stopped.step:
            click.echo(_NOTHING_LEARNED[keep].format(folder=folder), err=True)
        if stopped.signal is None:
            why = " because the validation loss stopped improving" if stopped.is_early else ""
            click.echo(
                f"done: {stopped.step} steps{why}, best validation loss {stopped.best_loss:.4f}, in {folder}", err=True
            )
        else:
            name = signal.Signals(stopped.signal).name
            click.echo(f"{name}: stopped after step {stopped.step}, saved; resume with --resume {folder}", err=True)
    status = 0 if stopped.signal is None else 128 + stopped.signal
    if processes.world_size > 1:
        leave_at_once(status)
    if status:
        sys.exit(status)


@contextlib.contextmanager
def steady_stderr() -> Iterator[None]:
    """Let a run continue if standard error is closed, its reader is gone or its disk is full. Its messages are then lost."""
    from gpt2.training.progress import SteadyStream

    before: Any = sys.stderr
    if before is None:
        _occupy_descriptor()
    stream: Any = SteadyStream(before)
    sys.stderr = stream
    try:
        yield
    finally:
        sys.stderr = before


def _occupy_descriptor() -> None:
    """Open the null device as standard error. The next file would get its number, and torch's messages would be in it."""
    try:
        os.fstat(2)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != 2:
            os.dup2(null, 2)
            os.close(null)
