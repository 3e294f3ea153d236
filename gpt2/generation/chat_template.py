"""ChatTemplate: the Jinja template of a model folder, which makes a prompt of messages. It depends on tokenizers only.

Jinja comes with torch. The template runs in Jinja's sandbox, as in transformers, because it is a file of somebody else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpt_config.errors import ConfigError
from gpt_config.file_reading import read_json, read_text
from gpt_encoder.interface import Tokenizer

_TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_FILE = "tokenizer_config.json"

# Characters of private use around the number of a special token that is ordinary text in a message.
_MARK = "\ue0f1{}\ue0f2"
_MARKED = re.compile("\ue0f1([0-9]+)\ue0f2")


class ChatTemplate:
    """A chat template. `source` is in the language of transformers' chat templates; `name` is where it comes from."""

    def __init__(self, source: str, name: str = "the chat template") -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source, self._name, self._error = source, name, TemplateError
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._refuse
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"{name} is not a chat template ({error}): correct or remove it") from None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ChatTemplate | None:
        """Return the chat template of a model folder, found as transformers finds it, or None if it has none.

        Of several templates by name it is the one named "default". ConfigError for a damaged file.
        """
        path = Path(folder) / _TEMPLATE_FILE
        try:
            if path.is_file():
                return cls(read_text(path), str(path))
            path = Path(folder) / _TOKENIZER_FILE
            settings = read_json(path) if path.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}): use another copy of the file") from None
        source = settings.get("chat_template") if isinstance(settings, dict) else None
        if isinstance(source, list):
            by_name = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = by_name.get("default")
        return cls(source, str(path)) if isinstance(source, str) else None

    def ids(self, messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> list[int]:
        """Return the ids of the prompt after which the model answers. ConfigError if the template refuses the messages.

        Special tokens come from the template only: in the messages they are ordinary text.
        """
        special = list(tokenizer.special_tokens)
        hidden = [{**message, "content": _without(message["content"], special)} for message in messages]
        roles: dict[str, Any] = dict(tokenizer.roles)
        try:
            text = self._template.render(messages=hidden, add_generation_prompt=True, **roles)
        except (self._error, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ConfigError(f"{self._name} cannot be applied: {error}") from None
        # At odd places are the numbers of special tokens in messages. The template writes the tokens at the ends itself.
        ids: list[int] = []
        for place, part in enumerate(_MARKED.split(text)):
            allowed, part = ((), special[int(part)]) if place % 2 else ("all", part)
            ids += tokenizer.encode(part, allowed_special=allowed, add_special_tokens=False)
        return ids

    def _refuse(self, message: str) -> NoReturn:
        raise self._error(message)


def _without(text: str, special: Sequence[str]) -> str:
    """Return `text` with a mark in place of each special token."""
    for number, token in enumerate(special):
        text = text.replace(token, _MARK.format(number))
    return text
