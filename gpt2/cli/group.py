"""The `gpt2` command: the list of commands, their exit codes, and how they read text. It does not know what they do."""

from __future__ import annotations

import codecs
import keyword
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from gpt2 import __version__
from gpt2.cli.streams import close_stdout, standard_streams
from gpt_config.errors import GPT2Error, GPT2Warning, InputError, one_line

# Heading of `gpt2 --help`: its commands. Each is the function of that name in the module of that name.
_SECTIONS = {
    "Generate": ("generate", "chat", "serve", "classify", "embed"),
    "Train and fine-tune": ("data", "train", "finetune"),
    "Measure": ("evaluate", "score", "benchmark", "verify"),
    "Inspect and convert": ("inspect", "tokenize", "quantize", "dequantize", "merge", "export", "import"),
}
COMMAND_NAMES = [name for names in _SECTIONS.values() for name in names]

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class LazyGroup(click.Group):
    """Imports a command's module when the command is called or listed, so that no command waits for another's imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return COMMAND_NAMES

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of that name, or None."""
        return load_command(name) if name in COMMAND_NAMES else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings, each with the first sentence of its docstring."""
        width = max(map(len, COMMAND_NAMES))
        for heading, names in _SECTIONS.items():
            with formatter.section(heading):
                # Without a limit a long sentence is wrapped; click's default cuts it off.
                rows = [(name.ljust(width), load_command(name).get_short_help_str(sys.maxsize)) for name in names]
                formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings=CONTEXT_SETTINGS, invoke_without_command=True)
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """GPT-2: generate text, train, fine-tune, evaluate and inspect."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def load_command(name: str | None) -> click.Command:
    """The command of that name; without a name `gpt2`, which has them all."""
    if name is None:
        return cli
    function = f"{name}_" if keyword.iskeyword(name) else name
    command: click.Command = getattr(import_module(f"gpt2.cli.{function}"), function)
    return command


def run(command: click.Command, args: Sequence[str] | None, prog_name: str) -> NoReturn:
    """Run `command` and exit: with 0, with 2 if the call is wrong, or with 1 after any other mistake of the user.

    A mistake is reported in one line on stderr. A closed pipe ends the command without a message.
    """
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", GPT2Warning)  # Python's default is once per line: two prompts may both be too long
    warnings.showwarning = _show_warning
    with standard_streams():
        status = _status_of(command, args, prog_name)
    sys.exit(status)


def _status_of(command: click.Command, args: Sequence[str] | None, prog_name: str) -> int:
    try:
        command.main(args, prog_name, standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except BrokenPipeError:
        return close_stdout()
    except click.UsageError as error:
        return _fail(f"{error.format_message().rstrip('.')} (see {_path(error, prog_name)} --help)", 2)
    except (GPT2Error, click.ClickException) as error:
        return _fail(error.format_message() if isinstance(error, click.ClickException) else str(error), 1)
    except OSError as error:
        if sys.stdout is not None and error.filename is None:
            close_stdout()  # perhaps it is full: Python's flush at exit would print the error again
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail("out of memory: use a smaller model, fewer samples, a smaller --batch_size, or --dtype bfloat16", 1)


def _fail(message: str, status: int) -> int:
    click.echo(f"error: {one_line(message)}", err=True)
    return status


def _path(error: click.UsageError, prog_name: str) -> str:
    return error.ctx.command_path if error.ctx else prog_name


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    click.echo(f"warning: {one_line(str(message))}", err=True)


def read_stdin() -> str:
    """All of standard input as text, without its last line end. InputError if it is closed or not UTF-8."""
    if sys.stdin is None:
        raise InputError("standard input is closed: give the text as an argument")
    text = decode_utf8(sys.stdin.buffer.read(), "standard input")
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def decode_argument(text: str, name: str) -> str:
    """The argument `text`. InputError if its bytes were not UTF-8: Python passes such bytes on as lone surrogates."""
    return decode_utf8(text.encode("utf-8", errors="surrogateescape"), name)


def decode_utf8(content: bytes, source: str) -> str:
    """`content` as text, without a byte-order mark, which may be that of UTF-16.

    InputError names `source` and the first byte that is not UTF-8.
    """
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16")
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}): convert it"
        ) from None
