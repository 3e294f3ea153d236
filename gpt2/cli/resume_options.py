"""The options of a run that is resumed: read from its file, compared with those given now, and written with the changes.

It does not know the commands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import click

from gpt2.cli.option_sources import is_on_command_line, origin, was_given
from gpt2.cli.options import Dataclass, option_of, options_from, values_of, wrong_options
from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import CheckpointError
from gpt_config.file_reading import read_json

# Of later versions: the file of an older run lacks them.
_LATER = (
    "engine", "patience", "tensorboard", "keep", "labels", "text_field", "special_tokens", "schedule",
    "min_learning_rate_share", "decay_steps", "decay_shape", "add_tokens", "new_rows",
    "optimizer", "momentum", "ema",
    "beta", "teacher", "student_start", "temperature_of_teacher", "teacher_share",
    "log", "eval_tasks", "eval_limit",
)  # fmt: skip
_FREE = ("device", "workers", "quiet", "tensorboard")  # of the terminal and the machine: they may change without a word
_NOT_STORED = ("out", "resume", "from_step")  # the run's folder, and the step that it resumes from
DATA = ("data", "validation_data", "test_data")
# Options that may change when a run is resumed. All others decide what the model is, or which rows a step has.
_CHANGEABLE = (
    *DATA, "max_steps", "epochs", "learning_rate", "schedule", "min_learning_rate", "min_learning_rate_share",
    "warmup_steps", "decay_steps", "decay_shape", "weight_decay", "beta1", "beta2", "momentum", "clip_norm", "ema",
    "temperature_of_teacher", "teacher_share",
    "dropout", "lora_dropout", "patience", "eval_interval", "evaluations_per_epoch", "eval_batches", "checkpoint_interval",
    "log_interval", "keep", "sample_prompt", "sample_tokens", "precision", "compile", "accumulation",
    "gradient_checkpointing", "sharding", "eval_tasks", "eval_limit", "log",
)  # fmt: skip
_LOWEST = ("min_learning_rate", "min_learning_rate_share")  # two names of one setting
_HISTORY = "changes"  # the key of the run's file for the changes of all resumptions
# Paths that a resumed run may need. They are stored in full, because it may be resumed from another working directory.
_PATHS = (*DATA, "init_from", "teacher", "from_pretrained", "template")
_NAMES = ("shakespeare", "default", "plain")  # what is not a path, even if there is a file of that name

Run = TypeVar("Run", bound=Dataclass)


class Change(NamedTuple):
    """An option that was given another value when the run was resumed."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"--{self.name} was {_shown(self.before)}, is now {_shown(self.now)}"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "not given" if isinstance(value, list | tuple) else str(value)


def write_run_file(run_file: Path, options: Dataclass) -> None:
    """Write the options of a new run, which --resume reads, into `run_file` as JSON."""
    atomic_write_json(run_file, _stored(options))


def write_changes(run_file: Path, options: Dataclass, changes: list[Change], step: int) -> None:
    """Write the options of a run that is resumed at `step`, and add `changes` to the list of all changes in `run_file`."""
    try:
        history = read_json(run_file).get(_HISTORY, [])
    except (OSError, ValueError, AttributeError):
        history = []
    new = {"step": step, **{change.name: [change.before, change.now] for change in changes}}
    atomic_write_json(run_file, {**_stored(options), _HISTORY: [*(history if isinstance(history, list) else []), new]})


def _stored(options: Dataclass) -> dict[str, Any]:
    return {name: _in_full(name, value) for name, value in values_of(options).items() if name not in _NOT_STORED}


def _in_full(name: str, value: Any) -> Any:
    """`value` with full paths in place of relative ones, if `name` is an option for paths."""
    if name not in _PATHS or value is None:
        return value
    if isinstance(value, list | tuple):
        return [_in_full(name, item) for item in value]
    return str(Path(value).resolve()) if value not in _NAMES and Path(value).exists() else value


def options_of_run(ctx: click.Context, run_file: Path, options: Run) -> tuple[Run, list[Change]]:
    """The options in `run_file`, which the run was started with, with the changes that are given now.

    UsageError for a change of an option that must stay. CheckpointError if the file is missing or damaged.
    """
    given_now = values_of(options)
    names = [name for name in given_now if name not in _NOT_STORED]
    stored = _read(ctx, run_file, type(options), names)
    asked = [name for name in names if is_on_command_line(ctx, name) and name not in _FREE]
    defaults = {parameter.name: parameter.get_default(ctx) for parameter in ctx.command.params if parameter.name in _LATER}
    changes = [Change(name, stored.get(name, defaults.get(name)), _as_stored(name, given_now[name])) for name in asked]
    changes = [change for change in changes if change.now != change.before]
    for change in changes:
        if change.name not in _CHANGEABLE:
            raise click.UsageError(
                f"--{change.name} cannot change when a run is resumed (it is {_shown(change.before)}): leave it out, or "
                "start a new run with --out"
            )
    _refuse_elsewhere(ctx, given_now, stored)
    free = {name: given_now[name] for name in (*_FREE, *_NOT_STORED) if name in given_now}
    new = {change.name: change.now for change in changes}
    if "epochs" in new and "max_steps" not in new:
        new["max_steps"] = 0  # the steps of the passes, no longer those of the start
    for one, other in (_LOWEST, _LOWEST[::-1]):
        if one in new and other not in new:
            new[other] = None  # the new one is in the place of the other
    with wrong_options():
        return options_from(type(options), {**given_now, **stored, **free, **new}), changes


def _refuse_elsewhere(ctx: click.Context, given_now: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """UsageError for an option in the environment or a file that has another value than the run has now.

    Only the command line changes a run: a file may still have the values that an earlier resumption has changed.
    """
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name not in stored or name not in given_now or name in (*_FREE, *_NOT_STORED) or not was_given(ctx, name):
            continue
        if not is_on_command_line(ctx, name) and (now := _as_stored(name, given_now[name])) != stored[name]:
            raise click.UsageError(
                f"{option_of(name)}={now!r} of {origin(ctx, parameter)} cannot change when a run is resumed, which was "
                f"started with {stored[name]!r}: remove it there, or start a new run with --out"
            )


def _as_stored(name: str, value: Any) -> Any:
    return _in_full(name, list(value) if isinstance(value, tuple) else value)


def _read(ctx: click.Context, run_file: Path, kind: type[Any], names: list[str]) -> dict[str, Any]:
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
    if wrong := _wrong_value(ctx, kind, stored):
        raise CheckpointError(f"{run_file} is damaged ({wrong}={stored[wrong]!r:.80}): start a new run with --out")
    return stored


def _wrong_value(ctx: click.Context, kind: type[Any], stored: Mapping[str, Any]) -> str:
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
