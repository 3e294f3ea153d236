"""All exceptions that a user of this package can cause, in one tree. Standard library only.

    GPT2Error
    ├── ConfigError          an invalid value in a configuration                      (a ValueError)
    ├── InputError           ids, prompts or options that do not fit the model        (a ValueError)
    ├── InputTypeError       an argument of the wrong type                            (a TypeError)
    ├── VocabularyError      tokenizer files that are missing, broken or not GPT-2's  (a ValueError)
    ├── WriteError           a file that cannot be written                            (an OSError)
    ├── DeviceError          an unknown or unavailable device or dtype                (a ValueError)
    ├── DataError            texts or token files that are missing, empty or broken   (a ValueError)
    ├── TrainingError        a run that cannot continue: NaN loss, a lost process     (a RuntimeError)
    └── CheckpointError      weights that are missing, broken or not GPT-2's
        └── ModelNotFoundError   no folder, shipped model, cached or reachable hub model has the name

    GPT2Warning              a result that the user may not expect                    (a UserWarning)

Each message is one line without control characters that names the value, the limit and the remedy in the library's terms.
The command line prints the line and adds the option or command to use (`gpt2.cli.options`).
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Any character at which `str.splitlines` breaks a line, with the blanks around it.
_LINE_BREAK = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


def one_line(text: str) -> str:
    r"""Return `text` in one line without control characters, for messages: names from files could move a terminal's cursor.

    >>> print(one_line("a\n  b\x1b[2J"))
    a b\x1b[2J
    """
    if text.isprintable():
        return text
    line = _LINE_BREAK.sub(" ", text).strip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


class Remedy(NamedTuple):
    """The remedy of an error, for programs that have an option or command for it: its key and, if known, its value.

    Keys and their values: "resume" (the folder of a run), "step" (of a checkpoint), "tokenizer" (a name), "base_model" (of
    an adapter), "merge" (the folder of an adapter), "dequantize" (the folder of an int8 model), "import" (a file of
    another program), "task" (of a fine-tuning run).
    """

    key: str
    value: str = ""


class GPT2Error(Exception):
    """Base class of all errors that a user of this package can cause. `remedy` is the message's remedy, for programs."""

    def __init__(self, *args: object, remedy: Remedy | None = None) -> None:
        super().__init__(*(one_line(arg) if isinstance(arg, str) else arg for arg in args))
        self.remedy = remedy


class ConfigError(GPT2Error, ValueError):
    """A configuration field has an invalid value, or one that this package does not support.

    `field` is the invalid field. The message begins with its name, or with the file that it was read from. `other_fields`
    are the other fields in the message. A program that has another name for the field shows `message_for(name)`.
    """

    def __init__(self, message: str, *, field: str | None = None, other_fields: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.field = field
        self.other_fields = other_fields

    def message_for(self, name: str) -> str:
        """The message with `name` in place of the field's name at its start; unchanged if it starts with anything else."""
        message = str(self)
        if self.field is None or not message.startswith(self.field):
            return message
        return name + message[len(self.field) :]


class InputError(GPT2Error, ValueError):
    """Token ids, prompts or generation options do not fit the model or tokenizer."""

    @classmethod
    def of_token(cls, token_id: int, vocab_size: int, *, token: str | None = None) -> InputError:
        """The error for `token_id` outside the vocabulary of a model, which has `vocab_size` ids. `token` is its text."""
        name = f"token id {token_id}" if token is None else f"token id {token_id} ({token!r})"
        return cls(
            f"{name} is outside the vocabulary of this model: ids go from 0 to {vocab_size - 1}; "
            "use the tokenizer that belongs to it"
        )


class InputTypeError(GPT2Error, TypeError):
    """An argument has the wrong type."""


class VocabularyError(GPT2Error, ValueError):
    """Tokenizer files are missing, broken, or describe a tokenizer that is not GPT-2's."""


class DeviceError(GPT2Error, ValueError):
    """A device or dtype is unknown, or this machine does not have it."""


class WriteError(GPT2Error, OSError):
    """A file cannot be written: invalid path, no permission, no space. An existing file is unchanged."""


class DataError(GPT2Error, ValueError):
    """A text, corpus or token file is missing, empty, too short, or not in the expected format."""


class TrainingError(GPT2Error, RuntimeError):
    """A training run cannot continue. The message says what is saved and how to resume."""


class CheckpointError(GPT2Error):
    """Weights are missing, broken, or do not fit GPT-2."""


class ModelNotFoundError(CheckpointError):
    """No folder, shipped model, cached download or reachable hub repository has the name."""


class GPT2Warning(UserWarning):
    """The request succeeded, but its result may not be what the user expects. The command line shows it in one line."""
