"""What the commands that train share: options from a config, resuming a run, and its end. It does not know the commands."""

from __future__ import annotations

import dataclasses
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from gpt2.cli.options import Choice, option, options_from, values_of, wrong_options
from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import CheckpointError, GPT2Warning
from gpt_config.file_reading import read_json

if TYPE_CHECKING:
    import torch

    from gpt2.training.distributed import Processes
    from gpt2.training.loop import Stopped, TrainingLoop

_LATER = ("engine", "patience", "tensorboard")  # options of later versions: the file of an older run lacks them
_FREE = ("device", "workers", "quiet", "tensorboard")  # of the terminal and the machine: may change when a run is resumed
_NOT_STORED = ("out", "resume", "from_step")  # the run's folder, and the step that it resumes from


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
    quiet: bool
    data_fingerprint: str = ""  # of the run's data: set when it starts, kept in its file

    @property
    def is_new(self) -> bool:
        """Whether this starts a run, and does not resume one."""
        return self.resume is None

    def run_folder(self) -> Path:
        """The run's folder. UsageError unless one of --out and --resume names it."""
        if (self.out is None) == (self.resume is None):
            raise click.UsageError("give either --out FOLDER to start a run, or --resume FOLDER to resume one")
        return Path(str(self.resume or self.out))


Run = TypeVar("Run", bound=RunOptions)


def field_options(
    config: type, helps: Mapping[str, Mapping[str, str]], choices: Mapping[str, Sequence[str]]
) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """An option for each field of a config, so that none can be forgotten.

    `helps` has, by heading, the help of each field. The default is shown unless the help names one itself.
    """
    headings = {name: heading for heading, texts in helps.items() for name in texts}

    def decorate(command: click.decorators.FC) -> click.decorators.FC:
        for field in reversed(dataclasses.fields(config)):
            heading = headings[field.name]
            text = helps[heading][field.name]
            kind: dict[str, Any] = {"default": field.default, "show_default": "[default:" not in text}
            if isinstance(field.default, bool):
                kind = {"is_flag": True, "default": False}
            elif field.name in choices:
                kind["type"] = Choice(choices[field.name])
            else:
                kind["type"] = type(field.default)
            command = option(f"--{field.name}", group=heading, help=text, **kind)(command)
        return command

    return decorate


def write_run_file(run_file: Path, options: RunOptions) -> None:
    """Write the options of a run, which --resume reads, into `run_file` as JSON."""
    atomic_write_json(run_file, {name: value for name, value in values_of(options).items() if name not in _NOT_STORED})


def options_of_run(ctx: click.Context, run_file: Path, options: Run) -> Run:
    """The options in `run_file`, which the run was started with.

    Options of the terminal and the machine may be given again; UsageError for any other. CheckpointError if the file is
    missing or damaged.
    """
    given_now = values_of(options)
    names = [name for name in given_now if name not in _NOT_STORED]
    changed = [name for name in names if _is_given(ctx, name) and name not in _FREE]
    if changed:
        raise click.UsageError(
            f"--{changed[0]} cannot change when a run is resumed: leave it out, or start a new run with --out"
        )
    try:
        stored = read_json(run_file)
    except OSError as error:
        raise CheckpointError(
            f"{run_file.parent} contains no run to resume ({error.strerror}): start one with --out"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{run_file} is damaged ({error}): start a new run with --out") from None
    if not isinstance(stored, dict) or not {*names} - {*_LATER} <= {*stored}:
        raise CheckpointError(f"{run_file} is damaged (options are missing): start a new run with --out")
    if wrong := _wrong_value(ctx, type(options), stored):
        raise CheckpointError(f"{run_file} is damaged ({wrong}={stored[wrong]!r:.80}): start a new run with --out")
    free = {name: given_now[name] for name in (*_FREE, *_NOT_STORED) if name in given_now}
    with wrong_options():
        return options_from(type(options), {**given_now, **stored, **free})


def _wrong_value(ctx: click.Context, kind: type[RunOptions], stored: Mapping[str, Any]) -> str:
    """The first name in `stored` whose value its option cannot have, or "". The fields of configs are checked by these."""
    for name, hint in get_type_hints(kind).items():
        if name in stored and not dataclasses.is_dataclass(hint) and not _is_of(stored[name], hint):
            return name
    for parameter in ctx.command.params:
        value, name = stored.get(parameter.name or ""), parameter.name or ""
        if isinstance(parameter.type, click.Choice) and value is not None and value not in parameter.type.choices:
            return name
    return ""


def _is_of(value: object, hint: Any) -> bool:
    """Whether a value of JSON has the type `hint` of an option: a union, a tuple of any length, or a plain type."""
    if args := get_args(hint):
        if get_origin(hint) is tuple:
            return isinstance(value, list) and all(_is_of(item, args[0]) for item in value)
        return any(_is_of(value, arg) for arg in args)
    return type(value) in ((int, float) if hint is float else (hint,))


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def resume_run(trainer: TrainingLoop, from_step: int | None) -> None:
    """Load the newest checkpoint, or that of a step. A run that ended before its first checkpoint starts again."""
    from gpt2.training.checkpoint import list_checkpoints
    from gpt2.training.loop import CHECKPOINT_FOLDER

    if from_step is None and not list_checkpoints(trainer.folder / CHECKPOINT_FOLDER):
        warnings.warn(f"the run in {trainer.folder} ended before its first checkpoint: it starts again", GPT2Warning, 2)
        return
    trainer.load(from_step)
    if trainer.step >= trainer.config.max_steps:
        warnings.warn(f"this run has already done all of its {trainer.step} steps", GPT2Warning, 2)


def report_threads(device: torch.device) -> None:
    """Print how many threads compute and why. With a fixed number, two runs agree to the last bit on every processor."""
    from gpt2.fast.threads import thread_report

    if device.type == "cpu":
        click.echo(f"computing on cpu, {thread_report()}", err=True)


def end_run(stopped: Stopped, folder: Path, processes: Processes) -> None:
    """Print how a run ended. After a signal, exit with the signal's status; several processes exit without exit handlers."""
    from gpt2.training.distributed import leave_at_once

    if processes.is_first:
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
