"""`gpt2 chat`: read prompts and print answers, until the end of the input. `gpt2.generation.conversation` remembers them."""

from __future__ import annotations

import difflib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from gpt2.cli.group import CONTEXT_SETTINGS, decode_argument, decode_utf8
from gpt2.cli.model_option import MODEL_HELP, TOKENIZER_HELP, load_model_option
from gpt2.cli.options import Command, option, pass_options, revision_option
from gpt2.cli.sampling_options import SamplingOptions, sampling_options, speed_options, warn_of_unused_options
from gpt2.weights.folder import locate_model
from gpt_config.atomic_write import atomic_write_text
from gpt_config.errors import GPT2Error, InputError, one_line

if TYPE_CHECKING:
    from gpt2.generation.chat_template import ChatTemplate
    from gpt2.generation.conversation import Conversation
    from gpt2.pretrained import GPT2
    from gpt_config.generation_config import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingOptions):
    """The options of `gpt2 chat`. There is one answer to each prompt."""

    from_pretrained: str | None
    model_name: str | None
    system: str
    plain: bool
    speculate: bool
    draft_model: str | None
    device: str
    dtype: str
    num_samples: int = 1

    @property
    def config(self) -> GenerationConfig:
        """How to answer. Raises UsageError for wrong values."""
        return self.generation_config(speculate=self.speculate or self.draft_model is not None)


# Options that matter only if tokens are drawn at random: setting one of them in a chat also sets do_sample.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")

_COMMANDS = {
    "/help": "list the commands and the values of all options",
    "/reset": "forget the conversation",
    "/save FILE": "write the conversation as text; as JSON if FILE ends with .json",
    "/quit": "end, as Ctrl-D does",
    "/OPTION": "show the value of an option",
    "/OPTION VALUE": "set an option, such as /temperature 0.7 or /top_k none",
    "//TEXT": "send a text that begins with /",
}
_EXAMPLES = """\b
Examples:
  gpt2 chat --from_pretrained gpt2-tiny --do_sample --temperature 0.7
  gpt2 chat --from_pretrained runs/instructions --system "Answer in one sentence."
"""
_prompt = partial(option, group="Prompt and model")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS, epilog=_EXAMPLES)
@_prompt("--from_pretrained", metavar="NAME", help=MODEL_HELP)
@revision_option("Prompt and model")
@_prompt("--model_name", metavar="NAME", help=TOKENIZER_HELP)
@_prompt("--system", default="", metavar="TEXT", help="What precedes the first prompt, for models with a template.")
@_prompt("--plain", is_flag=True, help="Continue the text, even if the model's folder has a template for instructions.")
@sampling_options
@speed_options
@pass_options(ChatOptions)
def chat(ctx: click.Context, options: ChatOptions) -> None:
    """Talk with a model, line by line.

    A model that was fine-tuned on instructions answers them; other models continue the text. /help lists the commands of the
    conversation. Ctrl-C stops an answer, and Ctrl-D ends the conversation.
    """
    converse(ctx, options)


chat.params = [parameter for parameter in chat.params if parameter.name != "num_samples"]


def is_on_a_terminal() -> bool:
    """Whether a user reads and writes."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def converse(ctx: click.Context, options: ChatOptions) -> None:
    """Load the model and run the conversation."""
    options.config  # noqa: B018 - wrong values are reported before the model is loaded
    system = decode_argument(options.system, "--system")
    draft_folder = None if options.draft_model is None else locate_model(options.draft_model)
    model, tokenizer, name = load_model_option(
        options.from_pretrained, device=options.device, dtype=options.dtype, tokenizer_name=options.model_name
    )
    from gpt2.generation.conversation import Conversation
    from gpt2.pretrained import load_model

    draft_model = None if draft_folder is None else load_model(draft_folder, device=options.device, dtype=options.dtype)
    template = None if options.plain else _template_of(model)
    if system and template is None:
        raise click.UsageError("--system is for models with a template, and this one continues plain text: leave it out")
    warn_of_unused_options(ctx, options.config)
    conversation = Conversation(model, tokenizer, template, system=system, draft_model=draft_model)
    _Chat(ctx, conversation, options, name).run()


def _template_of(model: GPT2) -> Any:
    """The template in the model's folder: the one of fine-tuning, else a chat template, else None."""
    from gpt2.finetuning.template import TEMPLATE_FILE, InstructionTemplate
    from gpt2.generation.chat_template import ChatTemplate
    from gpt2.weights.tokenizer import folder_of

    folder = folder_of(model)
    if folder is None:
        return None
    found: InstructionTemplate | ChatTemplate | None = None
    found = InstructionTemplate.load(folder) if (folder / TEMPLATE_FILE).is_file() else ChatTemplate.load(folder)
    return found


class _Chat:
    """The conversation at a terminal, or with lines from a pipe."""

    def __init__(self, ctx: click.Context, conversation: Conversation, options: ChatOptions, name: str) -> None:
        self._ctx, self._conversation, self._options, self._name = ctx, conversation, options, name
        known = {field.name for field in fields(SamplingOptions)} - {"num_samples"}
        self._parameters: Mapping[str, click.Parameter] = {
            parameter.name: parameter for parameter in ctx.command.params if parameter.name in known
        }
        self._saved: set[Path] = set()

    def run(self) -> None:
        """Answer each line, until the input ends."""
        if is_on_a_terminal():
            kind = "continues your text" if self._conversation.template is None else "answers"
            _note(f"{self._name} {kind}. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
            self._edit_lines()
        with _at_interrupt(signal.default_int_handler):
            while (line := _read_line()) is not None:
                try:
                    if line.startswith("/") and not line.startswith("//"):
                        if self._obey(line):
                            return
                    else:
                        self._answer(line.removeprefix("/") if line.startswith("//") else line)
                except click.ClickException as error:
                    _note(f"error: {one_line(error.format_message()).replace('--', '/')}")
                except GPT2Error as error:
                    _note(f"error: {one_line(str(error))}")

    def _edit_lines(self) -> None:
        """Let readline edit and remember lines, and complete commands with Tab, where Python has it."""
        with suppress(ImportError):
            import readline

            names = [f"/{name}" for name in self._names()]

            def complete(text: str, number: int) -> str | None:
                return [*(name for name in names if text.startswith("/") and name.startswith(text)), None][number]

            readline.set_completer_delims(" \t\n")
            readline.set_completer(complete)
            readline.parse_and_bind("tab: complete")

    def _names(self) -> list[str]:
        return ["help", "reset", "save", "quit", *self._parameters]

    def _answer(self, line: str) -> None:
        is_plain = self._conversation.template is None
        if not line.strip() and not is_plain:
            return
        if is_plain and self._conversation.turns and line and not line.startswith(" "):
            line = f"\n{line}"  # what is typed stands on a line of its own
        pieces = self._conversation.answer(line, self._options.config)
        n_pieces = n_interrupts = 0

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal n_interrupts
            n_interrupts += 1
            # Before the first piece there is nothing to keep, and computing the prompt may take long.
            if n_pieces == 0 or n_interrupts > 1:
                raise KeyboardInterrupt

        try:
            with _at_interrupt(stop):
                for piece in pieces:
                    n_pieces += 1
                    click.echo(piece, nl=False)
                    if n_interrupts:
                        break
        except KeyboardInterrupt:
            pass
        finally:
            with _at_interrupt(signal.SIG_IGN):  # until what was generated is part of the conversation
                pieces.close()
            click.echo()

    def _obey(self, line: str) -> bool:
        """Run a command. Returns whether the conversation ends."""
        command, _, rest = line[1:].strip().partition(" ")
        name, rest = command.replace("-", "_"), rest.strip()
        if name in ("quit", "exit"):
            return True
        if name == "help":
            self._help()
        elif name == "reset":
            self._conversation.reset()
        elif name == "save":
            self._save(rest)
        elif name in self._parameters:
            self._set(name, rest)
        else:
            near = difflib.get_close_matches(name, self._names(), 1)
            raise click.UsageError(f"/{name} is not a command: use {f'/{near[0]}, or ' if near else ''}/help for a list")
        return False

    def _help(self) -> None:
        for command, text in _COMMANDS.items():
            _note(f"{command:<24}{text}")
        for name in self._parameters:
            _note(f"/{name} {_shown(getattr(self._options, name))}")

    def _set(self, name: str, text: str) -> None:
        parameter = self._parameters[name]
        value = getattr(self._options, name)
        if text in ("none", "default"):
            value = () if parameter.multiple else parameter.get_default(self._ctx)
            if not isinstance(value, (int, float, str, tuple)):
                value = None  # click's mark for an option without a default
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            value = click.BOOL.convert(text or "on", parameter, self._ctx)
        elif text:
            given = parameter.type(text, parameter, self._ctx)
            value = (*value, given) if parameter.multiple else given
        changed = replace(self._options, **{name: value})
        if text and name in _OF_SAMPLING and not (name == "temperature" and value == 0):
            changed = replace(changed, do_sample=True)
        changed.config  # noqa: B018 - raises UsageError for wrong values, before anything changes
        also = ", do_sample on" if changed.do_sample and not self._options.do_sample and name != "do_sample" else ""
        self._options = changed
        _note(f"{name} {_shown(value)}{also}")

    def _save(self, file: str) -> None:
        if not file:
            raise click.UsageError("/save needs the name of a file: /save FILE")
        path = Path(file).absolute()
        if path not in self._saved and _exists(path):
            raise click.UsageError(f"{file} exists: save under another name")
        turns, messages = self._conversation.turns, self._conversation.messages
        if path.suffix == ".json":
            settings = {name: getattr(self._options, name) for name in self._parameters}
            content = {"model": self._name, "options": settings, "messages": messages}
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        elif self._conversation.template is None:
            text = "".join(turn.text + turn.answer for turn in turns) + "\n"
        else:
            text = "\n".join(f"{message['role']}: {message['content'].strip()}\n" for message in messages)
        atomic_write_text(path, text)
        self._saved.add(path)
        _note(f"saved {file}")


def _read_line() -> str | None:
    """The next line of the user, without its line end; None at the end of the input. A backslash at its end adds another."""
    if not is_on_a_terminal():
        if sys.stdin is None:
            raise InputError("standard input is closed: there is nothing to answer")
        content = sys.stdin.buffer.readline()
        return decode_utf8(content, "standard input").rstrip("\r\n") if content else None
    lines: list[str] = []
    while True:
        try:
            line = decode_argument(input("... " if lines else "> "), "the line")
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            click.echo()
            lines = []
            continue
        except (UnicodeDecodeError, InputError):
            _note("error: the line is not UTF-8 text: type it again")
            continue
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long: writing says so
        return False


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None or value == () else repr(value) if isinstance(value, (str, tuple)) else str(value)


def _note(text: str) -> None:
    click.echo(text, err=True)


@contextmanager
def _at_interrupt(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Iterator[None]:
    """Call `handler` at Ctrl-C."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
