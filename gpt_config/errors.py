"""Every error a user can cause, in one tree. It does not know who raises them.

    GPT2Error
    ├── ConfigError          a field of a config is not a value GPT-2 can have        (a ValueError)
    ├── InputError           ids, prompts or options that do not fit the model        (a ValueError)
    ├── InputTypeError       an argument of the wrong type                            (a TypeError)
    ├── VocabularyError      tokenizer files that are missing, broken or not GPT-2's  (a ValueError)
    ├── WriteError           a file that cannot be written                            (an OSError)
    ├── DeviceError          a device or dtype this machine does not have             (a ValueError)
    ├── DataError            texts or token files that are missing, empty or broken   (a ValueError)
    ├── TrainingError        a run that cannot go on: a loss of NaN, a lost process   (a RuntimeError)
    └── CheckpointError      weights that are missing, broken or not GPT-2's
        └── ModelNotFoundError   no folder, shipped model, cached or reachable hub model of that name

    GPT2Warning              something was done that the user may not expect         (a UserWarning)

Each message is one line that names the value, the limit and the remedy in the library's terms. The command line prints
that line, and adds the option or command that helps (`gpt2.cli.options`).
"""

from __future__ import annotations

from typing import NamedTuple


class Remedy(NamedTuple):
    """What helps against an error, for programs that have an option or a command for it: its key and, if known, its value.

    Keys: "resume" (the run's folder), "step" (of a checkpoint), "tokenizer" (a name), "base_model" (of an adapter),
    "merge" (an adapter's folder), "task" (of a fine-tuning).
    """

    key: str
    value: str = ""


class GPT2Error(Exception):
    """Base of every error that a user of this package can cause. `remedy` is for programs: the message tells it in words."""

    def __init__(self, *args: object, remedy: Remedy | None = None) -> None:
        super().__init__(*args)
        self.remedy = remedy


class ConfigError(GPT2Error, ValueError):
    """A configuration field has a value that GPT-2 cannot have, or that this package does not compute.

    `field` is the field at fault; the message begins with its name, or with the file it was read from. `other_fields` are
    those that the message names besides. Programs that call a field by another name show `message_for(name)`.
    """

    def __init__(self, message: str, *, field: str | None = None, other_fields: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.field = field
        self.other_fields = other_fields

    def message_for(self, name: str) -> str:
        """The message with `name` in place of the field's name at its beginning; unchanged where it begins otherwise."""
        message = str(self)
        if self.field is None or not message.startswith(self.field):
            return message
        return name + message[len(self.field) :]


class InputError(GPT2Error, ValueError):
    """Token ids, prompts or generation options that do not fit the model or tokenizer at hand."""

    @classmethod
    def of_token(cls, token_id: int, vocab_size: int) -> InputError:
        """For an id that is outside the vocabulary of a model."""
        return cls(
            f"token id {token_id} is outside the vocabulary of this model: ids go from 0 to {vocab_size - 1}; "
            "use the tokenizer that belongs to it"
        )


class InputTypeError(GPT2Error, TypeError):
    """An argument is of a type that has no meaning there."""


class VocabularyError(GPT2Error, ValueError):
    """Tokenizer files are missing, broken, or describe a tokenizer that is not GPT-2's."""


class DeviceError(GPT2Error, ValueError):
    """A device or dtype is unknown, or this machine does not have it."""


class WriteError(GPT2Error, OSError):
    """A file cannot be written: no such place, no permission, no space. What stood there before still does."""


class DataError(GPT2Error, ValueError):
    """A text, corpus or token file is missing, empty, too short, or not what it claims to be."""


class TrainingError(GPT2Error, RuntimeError):
    """A training run cannot go on. The message says what is saved and how to continue."""


class CheckpointError(GPT2Error):
    """Weights are missing, broken, or do not fit GPT-2."""


class ModelNotFoundError(CheckpointError):
    """No folder, shipped model, cached download or reachable hub repository goes by the name."""


class GPT2Warning(UserWarning):
    """What was asked for is done, but not quite as the user may expect. The command line shows it in one line."""
