"""InstructionTemplate: the text of a prompt around an instruction. Depends on neither tokens nor torch.

The template is saved with the weights, in `instruction_template.json`, so that later prompts have the form of the training
data.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from gpt_config.atomic_write import atomic_write_json, atomic_write_text
from gpt_config.errors import ConfigError, DataError
from gpt_config.file_reading import read_json
from gpt_config.validation import check_bool

TEMPLATE_FILE = "instruction_template.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True, kw_only=True)
class InstructionTemplate:
    """The text around each part of an instruction. The name of the part, in braces, is replaced by the part."""

    system: str = "{system}\n\n"
    instruction: str = "### Instruction:\n{instruction}\n\n"
    input: str = "### Input:\n{input}\n\n"
    thought: str = "### Thought:\n{thought}\n\n"
    response: str = "### Response:\n"  # the end of the prompt; the model continues after it
    thinks: bool = False  # the model writes a thought before each response

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "thinks":
                check_bool(field.name, value)
            elif not isinstance(value, str):
                raise ConfigError(f"{field.name}={value!r} must be a string")
            elif field.name != "response" and value.count("{" + field.name + "}") != 1:
                raise ConfigError(f"{field.name}={value!r} must contain {{{field.name}}} once, to be replaced by the text")

    def _fill(self, name: str, text: str) -> str:
        return str(getattr(self, name)).replace("{" + name + "}", text)  # not str.format, because texts may contain braces

    def prompt(self, instruction: str, *, input: str = "", system: str = "") -> str:
        """Return the text before the model's turn."""
        parts = (("system", system), ("instruction", instruction), ("input", input))
        question = "".join(self._fill(name, text) for name, text in parts if text)
        return question + (self.thought.partition("{thought}")[0] if self.thinks else self.response)

    def answer(self, response: str, *, thought: str = "") -> str:
        """Return the text that the model learns to write after the prompt."""
        return thought + self.thought.partition("{thought}")[2] + self.response + response if self.thinks else response

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the template into a model folder, and the same as a chat template, which transformers reads."""
        atomic_write_json(Path(folder) / TEMPLATE_FILE, dataclasses.asdict(self))
        atomic_write_text(Path(folder) / CHAT_TEMPLATE_FILE, self.to_jinja())

    def to_jinja(self) -> str:
        """Return the template in the language of transformers' chat templates, for messages with a role and a content.

        The messages of the user are instructions; a message of the assistant may have a `thought`.
        """
        start, _, end = self.thought.partition("{thought}")
        answer = ["message['content']", "eos_token"]
        if self.thinks:
            answer = ["(message['thought'] or '')", _literal(end + self.response), *answer]
        before = _literal(start if self.thinks else self.response)
        parts = {
            "if message['role'] == 'system' and message['content']": _around(self.system, "{system}"),
            "elif message['role'] == 'user'": _around(self.instruction, "{instruction}"),
            "elif message['role'] == 'assistant'": " + ".join([before, *answer]),
        }
        turns = "".join(f"{{% {condition} %}}{{{{ {text} }}}}" for condition, text in parts.items())
        loop = f"{{% for message in messages %}}{turns}{{% endif %}}{{% endfor %}}"
        return f"{loop}{{% if add_generation_prompt %}}{{{{ {before} }}}}{{% endif %}}\n"

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> InstructionTemplate:
        """Return the template of a model folder or a JSON file, or a built-in one: "default", or "plain", which adds only
        line ends.

        DataError if it does not exist; ConfigError if it is not a template.
        """
        if name in TEMPLATES:
            return TEMPLATES[str(name)]
        path = Path(name) / TEMPLATE_FILE if Path(name).is_dir() else Path(name)
        try:
            fields = read_json(path)
            return cls(**fields)
        except OSError:
            if path.name == TEMPLATE_FILE:
                raise DataError(
                    f"{path.parent} has no {TEMPLATE_FILE}: fine-tune the model on instructions first, see gpt2 finetune"
                ) from None
            raise DataError(
                f"there is no template {path}: name {' or '.join(TEMPLATES)}, a JSON file, or a folder"
            ) from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is not an instruction template: {error}") from None


def _around(text: str, part: str) -> str:
    before, _, after = text.partition(part)
    return f"{_literal(before)} + message['content'] + {_literal(after)}"


def _literal(text: str) -> str:
    """Return `text` as a string literal of Jinja."""
    known = {"\n": "\\n", "\t": "\\t", "'": "\\'", "\\": "\\\\"}
    plain = (known.get(c) or (c if " " <= c <= "~" else f"\\U{ord(c):08x}") for c in text)
    return f"'{''.join(plain)}'"


TEMPLATES = {
    "default": InstructionTemplate(),
    "plain": InstructionTemplate(instruction="{instruction}\n", input="{input}\n", thought="{thought}\n", response=""),
}
