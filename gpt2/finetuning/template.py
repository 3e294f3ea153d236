"""InstructionTemplate: how an instruction is put to a model, as text. It knows no tokens, and needs no torch.

The template stands beside the weights in `instruction_template.json`, so that whoever asks the model later asks as it was
taught.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import ConfigError, DataError
from gpt_config.validation import check_bool

TEMPLATE_FILE = "instruction_template.json"


@dataclass(frozen=True, kw_only=True)
class InstructionTemplate:
    """The text around each part of an instruction, with the name of the part in braces where it goes."""

    system: str = "{system}\n\n"
    instruction: str = "### Instruction:\n{instruction}\n\n"
    input: str = "### Input:\n{input}\n\n"
    thought: str = "### Thought:\n{thought}\n\n"
    response: str = "### Response:\n"  # stands before the response; what comes after it is the model's
    thinks: bool = False  # the model says a thought before each response

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "thinks":
                check_bool(field.name, value)
            elif not isinstance(value, str):
                raise ConfigError(f"{field.name}={value!r} must be a text")
            elif field.name != "response" and value.count("{" + field.name + "}") != 1:
                raise ConfigError(f"{field.name}={value!r} must hold {{{field.name}}} once: there the text goes")

    def _fill(self, name: str, text: str) -> str:
        return str(getattr(self, name)).replace("{" + name + "}", text)  # not str.format: texts have braces of their own

    def prompt(self, instruction: str, *, input: str = "", system: str = "") -> str:
        """Everything before the model's turn."""
        parts = (("system", system), ("instruction", instruction), ("input", input))
        question = "".join(self._fill(name, text) for name, text in parts if text)
        return question + (self.thought.partition("{thought}")[0] if self.thinks else self.response)

    def answer(self, response: str, *, thought: str = "") -> str:
        """What the model is to say after the prompt."""
        return thought + self.thought.partition("{thought}")[2] + self.response + response if self.thinks else response

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a model's folder."""
        atomic_write_json(Path(folder) / TEMPLATE_FILE, dataclasses.asdict(self))

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> InstructionTemplate:
        """That of a model's folder, of a JSON file, or of a name: "default", or "plain", which adds nothing but line ends.

        DataError if there is none; ConfigError if it is not a template.
        """
        if name in TEMPLATES:
            return TEMPLATES[str(name)]
        path = Path(name) / TEMPLATE_FILE if Path(name).is_dir() else Path(name)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(**fields)
        except OSError:
            if path.name == TEMPLATE_FILE:
                raise DataError(
                    f"{path.parent} has no {TEMPLATE_FILE}: it was not taught to respond: see gpt2 finetune"
                ) from None
            raise DataError(
                f"there is no template {path}: name {' or '.join(TEMPLATES)}, a JSON file, or a folder"
            ) from None
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path} is not an instruction template: {error}") from None


TEMPLATES = {
    "default": InstructionTemplate(),
    "plain": InstructionTemplate(instruction="{instruction}\n", input="{input}\n", thought="{thought}\n", response=""),
}
