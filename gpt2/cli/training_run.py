"""What the commands that train share: options from a config, how a run is gone on with, how it ends. It knows no command."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from gpt2.cli.options import options_from, values_of, wrong_options
from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import CheckpointError, GPT2Warning

if TYPE_CHECKING:
    from gpt2.training.distributed import Processes
    from gpt2.training.loop import Stopped, TrainingLoop

_LATER = ("engine", "patience", "tensorboard")  # options that runs of before they were there do not name
_FREE = ("device", "workers", "quiet", "tensorboard")  # of the terminal and the machine

_NOT_STORED = ("out", "resume", "from_step")  # where the run is, and from which step it goes on


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every command that trains is told besides how to train."""

    data: tuple[str, ...]
    validation_data: tuple[str, ...]
    out: str | None
    resume: str | None
    from_step: int | None
    device: str
    tensorboard: bool
    quiet: bool
    data_fingerprint: str = ""  # of the data that the run began with, once it has: kept in the run's file

    @property
    def is_new(self) -> bool:
        """Whether a run begins, rather than goes on."""
        return self.resume is None

    def run_folder(self) -> Path:
        """The run's folder. UsageError unless one of --out and --resume names it."""
        if (self.out is None) == (self.resume is None):
            raise click.UsageError("give either --out FOLDER for a new run, or --resume FOLDER to go on with one")
        return Path(str(self.resume or self.out))


Run = TypeVar("Run", bound=RunOptions)


def field_options(
    config: type, helps: Mapping[str, str], choices: Mapping[str, Sequence[str]]
) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """An option for each field of a config, so that none can be forgotten. A help that tells of a default stands for it."""

    def decorate(command: click.decorators.FC) -> click.decorators.FC:
        for field in reversed(dataclasses.fields(config)):
            text = helps[field.name]
            kind: dict[str, Any] = {"default": field.default, "show_default": "[default:" not in text}
            if isinstance(field.default, bool):
                kind = {"is_flag": True, "default": False}
            elif field.name in choices:
                kind["type"] = click.Choice(choices[field.name])
            else:
                kind["type"] = type(field.default)
            command = click.option(f"--{field.name}", help=text, **kind)(command)
        return command

    return decorate


def write_run_file(run_file: Path, options: RunOptions) -> None:
    """Write the options that a run goes on with into `run_file`, as JSON."""
    atomic_write_json(run_file, {name: value for name, value in values_of(options).items() if name not in _NOT_STORED})


def options_of_run(ctx: click.Context, run_file: Path, options: Run) -> Run:
    """The options in `run_file`, which a run was started with. Those of the terminal and the machine may be given again, no
    others."""
    given_now = values_of(options)
    names = [name for name in given_now if name not in _NOT_STORED]
    changed = [name for name in names if _is_given(ctx, name) and name not in _FREE]
    if changed:
        raise click.UsageError(
            f"--{changed[0]} cannot change when a run goes on: leave it out, or start a new run with --out"
        )
    try:
        stored = json.loads(run_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{run_file.parent} holds no run to go on with ({error.strerror}): start one with --out"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{run_file} is damaged ({error}): start a new run with --out") from None
    if not isinstance(stored, dict) or not {*names} - {*_LATER} <= {*stored}:
        raise CheckpointError(f"{run_file} is damaged (options are missing): start a new run with --out")
    free = {name: given_now[name] for name in (*_FREE, *_NOT_STORED) if name in given_now}
    with wrong_options():
        return options_from(type(options), {**given_now, **stored, **free})


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def go_on(trainer: TrainingLoop, from_step: int | None) -> None:
    """Load the newest checkpoint, or that of a step. A run that was lost before it wrote one begins anew."""
    from gpt2.training.checkpoint import list_checkpoints
    from gpt2.training.loop import CHECKPOINT_FOLDER

    if from_step is None and not list_checkpoints(trainer.folder / CHECKPOINT_FOLDER):
        warnings.warn(f"the run in {trainer.folder} was lost before its first checkpoint: it starts again", GPT2Warning, 2)
        return
    trainer.load(from_step)
    if trainer.step >= trainer.config.max_steps:
        warnings.warn(f"this run has done all of its {trainer.step} steps already", GPT2Warning, 2)


def end_run(stopped: Stopped, folder: Path, processes: Processes) -> None:
    """Say how a run ended. Leave with the signal's status if one ended it, and without Python's exit handlers if there are
    several processes."""
    from gpt2.training.distributed import leave_at_once

    if processes.is_first:
        if stopped.signal is None:
            why = " because the validation loss stopped improving" if stopped.is_early else ""
            click.echo(
                f"done: {stopped.step} steps{why}, best validation loss {stopped.best_loss:.4f}, in {folder}", err=True
            )
        else:
            name = signal.Signals(stopped.signal).name
            click.echo(f"{name}: stopped after step {stopped.step}, saved; go on with --resume {folder}", err=True)
    status = 0 if stopped.signal is None else 128 + stopped.signal
    if processes.world_size > 1:
        leave_at_once(status)
    if status:
        sys.exit(status)
