"""Where the values of options come from: the command line, the environment, a TOML file, or defaults, in this order.

Every option of a command has a variable, such as GPT2_GENERATE_TEMPERATURE. `--config FILE` or GPT2_CONFIG names the file.
`--show_config` prints what is in force. It knows options, not what they mean.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from gpt2.cli.group import COMMAND_NAMES, load_command
from gpt_config.errors import GPT2Warning
from gpt_config.file_reading import read_text

_CONFIG, _SHOW, _VALUES = "gpt2.config", "gpt2.show_config", "gpt2.values"  # keys in click's context
_NOT_SET_IN_FILES = ("config", "show_config")
_BY_RANK = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP, ParameterSource.DEFAULT)


def was_given(ctx: click.Context, name: str) -> bool:
    """Whether the user has set this parameter: on the command line, in the environment or in a file."""
    return _rank(ctx, name) < _BY_RANK.index(ParameterSource.DEFAULT)


def is_on_command_line(ctx: click.Context, name: str) -> bool:
    """Whether the parameter is on the command line."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def outranks(ctx: click.Context, name: str, other: str) -> bool:
    """Whether the first parameter was set in a place that comes before the second one's."""
    return _rank(ctx, name) < _rank(ctx, other)


def _rank(ctx: click.Context, name: str) -> int:
    source = ctx.get_parameter_source(name)
    return _BY_RANK.index(source) if source in _BY_RANK else len(_BY_RANK)


def origin(ctx: click.Context, parameter: click.Parameter) -> str:
    """The variable or the file that the parameter's value comes from, or "" for the command line and defaults."""
    source = ctx.get_parameter_source(parameter.name or "")
    if source is ParameterSource.ENVIRONMENT:
        return next((name for name in _names(parameter.envvar) if os.environ.get(name)), "")
    return str(ctx.meta.get(_CONFIG, "")) if source is ParameterSource.DEFAULT_MAP else ""


def key_of(parameter: click.Parameter) -> str:
    """The name of an option in files and variables: that of the command line, without hyphens at the beginning."""
    return _plain(parameter.opts[0])


def name_variables(command: click.Command) -> None:
    """Give each option of the command its variable. GPT2_CONFIG names the file of all commands; --show_config has none."""
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.envvar is None and parameter.name != "show_config":
            own = f"GPT2_{command.name}_{key_of(parameter)}".upper().replace("-", "_")
            parameter.envvar = [own, "GPT2_CONFIG"] if parameter.name == "config" else own


def source_options() -> list[click.Option]:
    """The options `--config` and `--show_config`, for every command."""

    def show(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        ctx.meta[_SHOW] = value

    config = click.Option(
        ["--config"],
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="Take options from this TOML file.",
    )
    shown = click.Option(
        ["--show_config"],
        is_flag=True,
        expose_value=False,
        callback=show,
        help="Print all options, their values and where they come from, and end.",
    )
    return [config, shown]


def warn_of_unknown_variables(command: click.Command) -> None:
    """Warn of variables that begin with the command's name and are not those of an option."""
    prefix = f"GPT2_{command.name}_".upper()
    known = [name for parameter in command.params for name in _names(parameter.envvar)]
    for name in sorted(os.environ):
        if name.startswith(prefix) and name not in known and os.environ[name]:
            warnings.warn(f"{name} is the variable of no option{_nearest(name, known)}: it is ignored", GPT2Warning, 2)


def name_origin(ctx: click.Context, error: click.BadParameter) -> None:
    """Let the error of a value name the variable or the file that the value comes from."""
    if error.param is not None and error.param_hint is None and (place := origin(ctx, error.param)):
        error.param_hint = f"{error.param.get_error_hint(ctx)} ({place})"


def remember(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Keep the value of an option for `show`, because click keeps only those that it passes on."""
    ctx.meta.setdefault(_VALUES, {})[parameter.name] = value


def shows(ctx: click.Context) -> bool:
    """Whether `--show_config` was given."""
    return bool(ctx.meta.get(_SHOW))


def show(ctx: click.Context) -> str:
    """The options in force as a TOML file for `--config`, with a comment that says where each value comes from."""
    lines = [f"[{ctx.command.name}]"]
    for parameter in ctx.command.params:
        if not isinstance(parameter, click.Option) or parameter.name in _NOT_SET_IN_FILES:
            continue
        kept = ctx.meta.get(_VALUES, {})
        value = ctx.params[parameter.name] if parameter.name in ctx.params else kept.get(parameter.name)
        key = key_of(parameter)
        if value is None or value == ():
            lines.append(f"# {key} is not set")
            continue
        if isinstance(value, tuple) and not parameter.multiple:
            value = ",".join(value)  # as the command line and files take it
        place = origin(ctx, parameter) or ("command line" if is_on_command_line(ctx, parameter.name or "") else "default")
        lines.append(f"{key} = {_toml(value)}  # {place}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    text = str(value).encode("utf-8", errors="replace").decode()
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read_config(ctx: click.Context, parameter: click.Parameter, file: str | None) -> None:
    if file is None:
        return
    try:
        content = tomllib.loads(read_text(file, "utf-8-sig"))
    except OSError as error:
        raise click.UsageError(f"cannot read {file} ({error.strerror or error}): name a TOML file") from None
    except ValueError as error:
        raise click.UsageError(f"{file} is not TOML: {error}") from None
    ctx.meta[_CONFIG] = file
    ctx.default_map = _values(ctx.command, content, file)


def _values(command: click.Command, content: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The values of the command's options by the names of parameters. UsageError for unknown keys and wrong kinds."""
    commands = {str(command.name): command}
    for name, table in content.items():
        if isinstance(table, dict):
            plain = _plain(name)
            if plain != command.name and plain not in COMMAND_NAMES:
                raise click.UsageError(f"{file}: [{name}] is not a command{_nearest(plain, COMMAND_NAMES)}")
            commands.setdefault(plain, load_command(plain))
            _check_keys(table, _options_of(commands[plain]), f"an option of gpt2 {plain}", file)
    own, of_all = _options_of(command), {key: value for key, value in content.items() if not isinstance(value, dict)}
    if any(_plain(key) not in own for key in of_all):
        everywhere = dict(own)
        for name in COMMAND_NAMES:
            everywhere |= _options_of(load_command(name))
        _check_keys(of_all, everywhere, "an option of any command", file)
    tables = [table for name, table in content.items() if isinstance(table, dict) and _plain(name) == command.name]
    values = {}
    for key, value in [*of_all.items(), *(pair for table in tables for pair in table.items())]:
        if _plain(key) in own:
            option = own[_plain(key)]
            values[str(option.name)] = _value(option, value, f"{file}: {key}")
    return values


def _options_of(command: click.Command) -> dict[str, click.Option]:
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    return {_plain(name): option for option in options for name in option.opts if option.name not in _NOT_SET_IN_FILES}


def _check_keys(table: Mapping[str, Any], known: Mapping[str, click.Option], kind: str, file: str) -> None:
    for key in table:
        if _plain(key) not in known:
            raise click.UsageError(f"{file}: {key} is not {kind}{_nearest(_plain(key), list(known))}")


def _value(option: click.Option, value: Any, place: str) -> Any:
    """The value as the command line would give it. So 0.5 is not a whole number, and a word is not a flag."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise click.UsageError(f"{place} = {value!r} must be true or false")
        return value
    if option.multiple:
        return [_scalar(item, place) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, bool) and isinstance(option.type, click.Choice) and str(value).lower() in option.type.choices:
        return str(value).lower()  # early_stopping = true
    return _scalar(value, place)


def _scalar(value: Any, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise click.UsageError(f"{place} = {value!r} must be a number or a string")
    if "\0" in str(value):  # which no argument of a command line can have
        raise click.UsageError(f"{place} = {value!r} must be a string without null bytes")
    return str(value)


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _names(envvar: str | Sequence[str] | None) -> Sequence[str]:
    return [envvar] if isinstance(envvar, str) else envvar or ()


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""
