"""A command's options as one typed object, and errors of the library in the terms of these options. It knows no command."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import click

from gpt_config.cores import MOST_THREADS, fixed_threads
from gpt_config.errors import ConfigError, GPT2Error


class Dataclass(Protocol):
    """Any dataclass, for the type checker."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


Options = TypeVar("Options", bound=Dataclass)

# Fields of configs whose option has another name; all others are called as their field.
_OPTION_OF_FIELD = {
    "max_new_tokens": "max_tokens",
    "num_return_sequences": "num_samples",
    **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), "dropout"),
}

# What helps against an error, by the key of its remedy: an option, where the command has it, or another command; and what
# stands for its value where that is not known.
_REMEDIES = {
    "resume": ("--resume", "FOLDER"),
    "step": ("--step", "N"),
    "tokenizer": ("--model_name", "NAME"),
    "base_model": ("gpt2 merge --from_pretrained", "NAME"),
    "merge": ("gpt2 merge --out FOLDER", "ADAPTER"),
    "task": ("gpt2 finetune --task", "TASK"),
}


def pass_options(
    kind: type[Options],
) -> Callable[[Callable[[click.Context, Options], None]], Callable[..., None]]:
    """Decorates a command's function: it gets click's context and its parameters as one object of the dataclass `kind`."""

    def decorate(command: Callable[[click.Context, Options], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            with wrong_options():
                options = options_from(kind, values)
            command(click.get_current_context(), options)

        return call

    return decorate


def options_from(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """The object of `kind` with these values by name; a field that is a config takes the values of the config's own fields.

    JSON's lists become tuples, and values that are no field are left out. ConfigError if a config refuses its values.
    """
    hints, made = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            made[field.name] = options_from(hints[field.name], values)
        elif field.name in values:
            value = values[field.name]
            made[field.name] = tuple(value) if isinstance(value, list) else value
    make: Callable[..., Options] = kind
    return make(**made)


def values_of(options: Dataclass) -> dict[str, Any]:
    """The inverse of `options_from`: all values by name, those of configs too."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        is_config = dataclasses.is_dataclass(value) and not isinstance(value, type)
        values |= values_of(value) if is_config else {field.name: value}
    return values


def option_of(field: str) -> str:
    """The option that sets a config's field: "--max_tokens" for max_new_tokens."""
    return f"--{_OPTION_OF_FIELD.get(field, field)}"


def in_options_terms(error: ConfigError) -> str:
    """The error's message, in which the field it begins with is called by its option.

    Fields that it names besides are explained at the end where their option has another name.
    """
    if error.field is None:
        return str(error)
    renamed = [field for field in error.other_fields if field in _OPTION_OF_FIELD]
    explained = ", ".join(f"{field} is {option_of(field)}" for field in renamed)
    return error.message_for(option_of(error.field)) + (f" ({explained})" if explained else "")


def threads_option(command: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command that computes: `--threads N` fixes the number of threads while it runs."""

    def fix(ctx: click.Context, parameter: click.Parameter, count: int | None) -> None:
        if count is not None:
            ctx.with_resource(_computing_with(count))

    return click.option(
        "--threads",
        type=click.IntRange(1, MOST_THREADS),
        expose_value=False,
        callback=fix,
        help="Always compute with this many threads.  [default: as many as pay, at most one per core]",
    )(command)


@contextmanager
def _computing_with(count: int) -> Iterator[None]:
    if "torch" not in sys.modules:  # it reads this as it is imported
        os.environ["OMP_NUM_THREADS"] = str(count)
        with fixed_threads(count, f"--threads {count}"):
            yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with fixed_threads(count, f"--threads {count}"):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def wrong_options() -> Iterator[None]:
    """A ConfigError within is a wrong call: a UsageError that names the option."""
    try:
        yield
    except ConfigError as error:
        raise click.UsageError(in_options_terms(error)) from None


class Command(click.Command):
    """A command whose errors are told in the terms of its own options."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except GPT2Error as error:
            raise click.ClickException(self._in_own_terms(error)) from error

    def _in_own_terms(self, error: GPT2Error) -> str:
        options = {option for parameter in self.params for option in parameter.opts}
        is_option = isinstance(error, ConfigError) and error.field is not None and option_of(error.field) in options
        message = in_options_terms(error) if isinstance(error, ConfigError) and is_option else str(error)
        if error.remedy is None:
            return message
        remedy, placeholder = _REMEDIES[error.remedy.key]
        if remedy.startswith("--") and remedy not in options:
            return message
        return f"{message} ({remedy} {error.remedy.value or placeholder})"
