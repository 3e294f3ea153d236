"""What all commands share: options in groups, as one typed object, and the library's errors in terms of these options.

It does not know the commands.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import click

from gpt2.cli import option_sources
from gpt_config.cores import MOST_THREADS, fixed_threads, process_limit
from gpt_config.errors import ConfigError, GPT2Error
from gpt_config.new_tokens import new_tokens


class Dataclass(Protocol):
    """Any dataclass, for the type checker."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


Options = TypeVar("Options", bound=Dataclass)

# Fields of configs whose option has another name; every other option has the name of its field.
_OPTION_OF_FIELD = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "num_samples",
    "stop_at_eot": "ignore_eot",
    **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), "dropout"),
}

# The remedy for an error, by its key: an option, if the command has it, or another command; and a placeholder for an
# unknown value.
_REMEDIES = {
    "resume": ("--resume", "FOLDER"),
    "step": ("--step", "N"),
    "tokenizer": ("--model_name", "NAME"),
    "base_model": ("gpt2 merge --from_pretrained", "NAME"),
    "merge": ("gpt2 merge --out FOLDER", "ADAPTER"),
    "dequantize": ("gpt2 dequantize --out FOLDER", "MODEL"),
    "import": ("gpt2 import --out FOLDER", "FILE"),
    "task": ("gpt2 finetune --task", "TASK"),
}

_REVISION = "gpt2.revision"  # the key of `revision_option` in click's context

_LONGEST_NAME = 30  # columns of --help: an option with a longer name has its help on the next line, as click does it


class Option(click.Option):
    """An option that --help lists under the heading `group`."""

    def __init__(self, *args: Any, group: str | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """The value in the option's type."""
        value = super().type_cast_value(ctx, value)
        option_sources.remember(ctx, self, value)
        return value

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """The value of the option's variable. It is one value, also if the option may be given several times."""
        value = self.resolve_envvar_value(ctx)
        return (value,) if self.multiple and value is not None else super().value_from_envvar(ctx)


def option(*names: str, group: str | None = None, **settings: Any) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """`click.option`, listed by --help under the heading `group`."""
    return click.option(*names, cls=Option, group=group, **settings)


def options_together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A decorator that adds several options to a command, in this order."""

    def decorate(command: Any) -> Any:
        for add in reversed(options):
            command = add(command)
        return command

    return decorate


class Choice(click.Choice[str]):
    """One of some names, shown in --help and errors as they are declared. `-` and `_` are accepted for each other."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The declared name."""
        declared = {_with_underscores(choice): choice for choice in self.choices}
        return super().convert(declared.get(_with_underscores(str(value)), value), param, ctx)


class NewTokens(click.ParamType[tuple[str, ...]]):
    """New special tokens with commas between them, as a tuple."""

    name = "text,text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The texts."""
        try:
            return new_tokens(value)
        except ConfigError as error:
            raise click.UsageError(in_options_terms(error), ctx) from None


def _with_underscores(name: str) -> str:
    return name.replace("-", "_")


def pass_options(
    kind: type[Options],
) -> Callable[[Callable[[click.Context, Options], None]], Callable[..., None]]:
    """Decorate a command's function: it gets click's context and its parameters as one object of the dataclass `kind`."""

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

    JSON's lists become tuples. Values without a field are ignored. ConfigError if a config refuses its values.
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
    """The inverse of `options_from`: all values by name, including those of configs."""
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
    """The error's message, with the option's name in place of the field's name at its beginning.

    If other fields in the message have an option of another name, the end of the message says which.
    """
    if error.field is None:
        return str(error)
    renamed = [field for field in error.other_fields if field in _OPTION_OF_FIELD]
    explained = ", ".join(f"{field} is {option_of(field)}" for field in renamed)
    return error.message_for(option_of(error.field)) + (f" ({explained})" if explained else "")


def revision_option(group: str | None = None, of: str = "from_pretrained") -> Callable[[click.decorators.FC], Any]:
    """The option `--revision REV` of a command whose parameter `of` names a model: it makes the name "NAME@REV"."""

    def remember(ctx: click.Context, parameter: click.Parameter, revision: str | None) -> None:
        if revision is not None:
            ctx.meta[_REVISION] = of, revision

    return option(
        "--revision",
        group=group,
        metavar="REV",
        expose_value=False,
        callback=remember,
        help="The branch, tag or commit of a model on the hub.  [default: main]",
    )


def threads_option(group: str | None = None) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """The option `--threads N` of a command that computes: it fixes the number of threads while the command runs."""

    def fix(ctx: click.Context, parameter: click.Parameter, count: int | None) -> None:
        if count is not None:
            ctx.with_resource(_computing_with(count))
        else:
            process_limit()  # a wrong GPT2_THREADS ends the command before it computes or writes anything

    return option(
        "--threads",
        group=group,
        type=click.IntRange(1, MOST_THREADS),
        expose_value=False,
        callback=fix,
        help="Always use this many threads.  [default: as many as are fastest, at most one per core]",
    )


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
    """Turn a ConfigError into a UsageError that names the option, and the variable or file that it comes from."""
    try:
        yield
    except ConfigError as error:
        place = _origin(option_of(error.field)) if error.field else ""
        raise click.UsageError(in_options_terms(error) + (f" (set by {place})" if place else "")) from None


def _origin(name: str) -> str:
    ctx = click.get_current_context(silent=True)
    parameters = ctx.command.params if ctx else []
    places = [option_sources.origin(ctx, parameter) for parameter in parameters if ctx and name in parameter.opts]
    return next(iter(places), "")


class Command(click.Command):
    """A command with its options in groups, which `-` and `_` may both spell. Its errors name its own options.

    Options also come from the environment and from a file: see `option_sources`.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params += option_sources.source_options()
        option_sources.name_variables(self)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line, the environment and the file."""
        try:
            rest = super().parse_args(ctx, args)
        except click.BadParameter as error:
            option_sources.name_origin(ctx, error)
            raise
        option_sources.warn_of_unknown_variables(self)
        return rest

    def make_parser(self, ctx: click.Context) -> Any:
        """The parser of the command line. `--top-k` is `--top_k`.

        Only the parser normalises names: if the context did, click would also change the values of a Choice.
        """
        names = copy.copy(ctx)
        names.token_normalize_func = _with_underscores
        return super().make_parser(names)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings of their groups, in the order of each group's first option.

        A command with fewer than two groups has click's own list.
        """
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        if len({getattr(parameter, "group", None) for parameter in options} - {None}) < 2:
            super().format_options(ctx, formatter)
            return
        records: dict[str | None, list[tuple[str, str]]] = {}
        for parameter in options:
            if (record := parameter.get_help_record(ctx)) is not None:
                records.setdefault(getattr(parameter, "group", None), []).append(record)
        width = min(_LONGEST_NAME, max(len(name) for rows in records.values() for name, _ in rows))
        for heading in sorted(records, key=lambda heading: heading is None):  # those without a group come last
            with formatter.section(heading or "Other options"):
                rows = records[heading]
                formatter.write_dl([(name.ljust(width), text) for name, text in rows], col_max=_LONGEST_NAME)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command. Its errors become a ClickException."""
        if option_sources.shows(ctx):
            click.echo(option_sources.show(ctx))
            return None
        if _REVISION in ctx.meta:
            of, revision = ctx.meta[_REVISION]
            ctx.params[of] = f"{ctx.params[of] or 'gpt2'}@{revision}"
        try:
            return super().invoke(ctx)
        except GPT2Error as error:
            raise click.ClickException(self._in_own_terms(error)) from error

    def _in_own_terms(self, error: GPT2Error) -> str:
        options = {name for parameter in self.params for name in parameter.opts}
        is_option = isinstance(error, ConfigError) and error.field is not None and option_of(error.field) in options
        message = in_options_terms(error) if isinstance(error, ConfigError) and is_option else str(error)
        if error.remedy is None:
            return message
        remedy, placeholder = _REMEDIES[error.remedy.key]
        if remedy.startswith("--") and remedy not in options:
            return message
        return f"{message} ({remedy} {error.remedy.value or placeholder})"
