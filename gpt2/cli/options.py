"""What the fields of configs are called on the command line. It knows no command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from gpt_config.errors import ConfigError

# Fields of configs whose option has another name; all others are called as their field.
_OPTION_OF_FIELD = {"max_new_tokens": "max_tokens", "num_return_sequences": "num_samples"}


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
