"""What the command line calls the fields of configs, and which option helps against an error. It knows no command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from gpt_config.errors import ConfigError, GPT2Error

# Fields of configs whose option has another name; all others are called as their field.
_OPTION_OF_FIELD = {"max_new_tokens": "max_tokens", "num_return_sequences": "num_samples"}

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
