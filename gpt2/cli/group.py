"""The `gpt2` command: its list of commands, and how each of them ends. It knows nothing of what they do."""

from __future__ import annotations

import codecs
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from gpt2 import __version__
from gpt_config.errors import GPT2Error, GPT2Warning, InputError

_NAMES = (
    *("benchmark", "classify", "evaluate", "finetune", "generate", "merge"),
    *("quantize", "score", "tokenize", "train", "verify"),
)
_COMMANDS = {name: f"gpt2.cli.{name}" for name in _NAMES}

CONTEXT_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "token_normalize_func": lambda name: name.replace("-", "_"),  # --top-k is --top_k
}


class LazyGroup(click.Group):
    """Imports a command's file when it is called or listed, so that a command need not wait for what others need."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return load_command(name) if name in _COMMANDS else None


@click.group(cls=LazyGroup, context_settings=CONTEXT_SETTINGS, invoke_without_command=True)
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """GPT-2: generate text, and look at how it is made."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def load_command(name: str | None) -> click.Command:
    """The command of that name, or all of them as `gpt2` if there is none."""
    return cli if name is None else getattr(import_module(_COMMANDS[name]), name)


def run(command: click.Command, args: Sequence[str] | None, prog_name: str) -> NoReturn:
    """Run `command` and exit. A mistake of the user's is one line on stderr: exit 2 for a wrong call, 1 for all else.

    A closed pipe ends quietly.
    """
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", GPT2Warning)  # not only once, as is the default: two prompts may both be too long
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a stand-in for it, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        command.main(args, prog_name, standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        status = 0
    except BrokenPipeError:
        status = _close_stdout()
    except click.UsageError as error:
        status = _fail(f"{error.format_message().rstrip('.')} (see {_path(error, prog_name)} --help)", 2)
    except (GPT2Error, click.ClickException) as error:
        status = _fail(error.format_message() if isinstance(error, click.ClickException) else str(error), 1)
    except OSError as error:
        status = _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        status = _fail("out of memory: use a smaller model, fewer samples, a smaller --batch_size, or --dtype bfloat16", 1)
    sys.exit(status)


def _fail(message: str, status: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return status


def _path(error: click.UsageError, prog_name: str) -> str:
    return error.ctx.command_path if error.ctx else prog_name


def _close_stdout() -> int:
    # Nobody reads any more. Point stdout elsewhere, or Python's own flush at exit would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1  # as click ends where it meets the closed pipe itself


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    click.echo(f"warning: {message}", err=True)


def read_stdin() -> str:
    """All of standard input as text, without its last line end. InputError if it is closed or not UTF-8."""
    if sys.stdin is None:
        raise InputError("standard input is closed: give the text as an argument")
    return decode_utf8(sys.stdin.buffer.read(), "standard input").removesuffix("\n")


def decode_argument(text: str, name: str) -> str:
    """`text` as it came from the shell, if its bytes are UTF-8; Python passes others on as lone surrogates."""
    return decode_utf8(text.encode("utf-8", errors="surrogateescape"), name)


def decode_utf8(content: bytes, source: str) -> str:
    """`content` as text, without a byte-order mark; InputError names `source` and the byte that is not UTF-8."""
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}): convert it"
        ) from None
