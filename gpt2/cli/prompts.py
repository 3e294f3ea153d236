"""The prompts of `gpt2 generate`: an argument, standard input, a file of lines or of JSON, or an instruction. No models."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from gpt2.cli.group import decode_argument, decode_utf8, read_stdin
from gpt2.cli.model_option import default_model
from gpt2.cli.options import option_of
from gpt2.generation.prompts import TemplateText
from gpt2.weights.folder import locate_model
from gpt_config.errors import InputError
from gpt_config.file_reading import parse_json

_DEFAULT_FIELDS = ("prompt", "text")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


@dataclass(frozen=True)
class Prompt:
    """A prompt with its place ("FILE, line 3"), the options that its line sets, and the line's other fields."""

    text: str
    place: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    is_json: bool = False


def unescape(text: str) -> str:
    r"""`text` with a line end for backslash-n; the same for \t, \r and \\. Other backslashes stay."""
    if isinstance(text, TemplateText):
        return text.each(unescape)
    return re.sub(r"\\[ntr\\]", lambda match: _ESCAPES[match[0]], text)


def has_escapes(text: str) -> bool:
    """Whether `text` contains a backslash and an n or a t, which `unescape` would replace."""
    return re.search(r"\\[nt]", text) is not None


def argument_prompt(prompt: str) -> Prompt:
    """The argument PROMPT; "-" is standard input."""
    return Prompt(read_stdin() if prompt == "-" else decode_argument(prompt, "the prompt"))


def file_prompts(file: str, prompt_field: str | None, option_names: Collection[str]) -> list[Prompt]:
    """The prompts of `--file`; "-" is standard input. InputError names a wrong line.

    Each line is a prompt, unless the file is JSONL: then each line is an object with the prompt in `prompt_field`, or in
    "prompt" or "text". A file is JSONL by its name, or if its first line is such an object and its name does not end in
    .txt. Fields of `option_names` are the line's options; an option that is null is not set.
    """
    if file == "-":
        source, text = "standard input", read_stdin()
    else:
        source, text = file, decode_utf8(Path(file).read_bytes(), file).removesuffix("\n")
    if not text:
        raise InputError(f"{source} is empty: it needs at least one line, each a prompt")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    names = (prompt_field,) if prompt_field else _DEFAULT_FIELDS
    is_text = Path(file).suffix.lower() == ".txt"
    if is_json_name(file) or prompt_field or (not is_text and _is_object_with(lines, names)):
        prompts = list(_json_prompts(lines, source, names, option_names))
        if not prompts:
            raise InputError(f"{source} has blank lines only: it needs at least one JSON object with a prompt")
        return prompts
    return [Prompt(line, f"{source}, line {number}") for number, line in enumerate(lines, 1)]


def is_json_name(file: str) -> bool:
    """Whether the name of a file says that it contains JSON."""
    return Path(file).suffix.lower() in _JSON_SUFFIXES


def _is_object_with(lines: list[str], names: tuple[str, ...]) -> bool:
    first = next((line for line in lines if line.strip()), "")
    try:
        item = parse_json(first)
    except ValueError:
        return False
    return isinstance(item, dict) and any(isinstance(item.get(name), str) for name in names)


def _json_prompts(lines: list[str], source: str, names: tuple[str, ...], option_names: Collection[str]) -> Iterator[Prompt]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{source}, line {number}"
        try:
            item = parse_json(line)
        except ValueError as error:
            raise InputError(f"{place}: it is not JSON ({error}): write one object per line") from None
        if not isinstance(item, dict):
            raise InputError(f"{place}: it is {type(item).__name__}, not an object: write one object per line")
        name = next((name for name in names if name in item), None)
        if name is None:
            raise InputError(f"{place}: there is no field {' or '.join(map(repr, names))}: name it with --field")
        text = item.pop(name)
        if not isinstance(text, str):
            raise InputError(f"{place}: the field {name!r} is {type(text).__name__}, not a string")
        yield Prompt(text, place, _options_of_line(item, option_names, place), item, is_json=True)


def _options_of_line(item: dict[str, Any], option_names: Collection[str], place: str) -> dict[str, Any]:
    """Take the options out of the object of a line. InputError for two names of one option, such as max_new_tokens."""
    given: dict[str, Any] = {}
    for key in list(item):
        name = option_of(key).removeprefix("--")
        if name not in option_names or (value := item.pop(key)) is None:
            continue
        if name in given:
            raise InputError(f"{place}: {key} is another name of {name}, which the line also has: leave one out")
        given[name] = value
    return given


def instruction_prompt(instruction: str, about: str | None, model_name: str | None) -> Prompt:
    """The instruction in the template that the model was trained with, which is in its folder."""
    if not instruction.strip():
        raise click.UsageError("--instruction is empty: say what to do")
    from gpt2.finetuning.template import InstructionTemplate

    template = InstructionTemplate.load(locate_model(model_name or default_model()))
    given = decode_argument(about or "", "--input")
    return Prompt(template.prompt(decode_argument(instruction, "--instruction"), input=given))
