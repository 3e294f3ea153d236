"""InstructionTemplate: the text of a prompt around an instruction. Depends on neither tokens nor torch.

The template is saved with the weights, in `instruction_template.json`, so that later prompts have the form of the training
data.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from gpt2.generation.prompts import TemplateText
from gpt_config.atomic_write import atomic_write_json, atomic_write_text
from gpt_config.errors import ConfigError, DataError
from gpt_config.file_reading import read_json
from gpt_config.validation import check_bool
from gpt_config.whole_folder import whole_folder
from gpt_encoder.interface import Tokenizer

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
    # Special tokens that the template spells are tokens. It is not in the repr, from which older runs have a fingerprint.
    special_tokens: bool = dataclasses.field(default=False, repr=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("thinks", "special_tokens"):
                check_bool(field.name, value)
            elif not isinstance(value, str):
                raise ConfigError(f"{field.name}={value!r} must be a string")
            elif field.name != "response" and value.count("{" + field.name + "}") != 1:
                raise ConfigError(f"{field.name}={value!r} must contain {{{field.name}}} once, to be replaced by the text")

    def for_tokenizer(self, tokenizer: Tokenizer) -> InstructionTemplate:
        """Return the template whose special tokens are tokens, if it spells some of `tokenizer`."""
        own = "\n".join((self.system, self.instruction, self.input, self.thought, self.response))
        return dataclasses.replace(self, special_tokens=any(token in own for token in tokenizer.special_tokens))

    def _filled(self, name: str, text: str) -> list[tuple[str, bool]]:
        before, _, after = str(getattr(self, name)).partition("{" + name + "}")  # texts may contain braces
        return [(before, self.special_tokens), (text, False), (after, self.special_tokens)]

    def prompt(self, instruction: str, *, input: str = "", system: str = "") -> TemplateText:
        """Return the text before the model's turn. `encode_prompt` gives its ids."""
        texts = (("system", system), ("instruction", instruction), ("input", input))
        parts = [part for name, text in texts if text for part in self._filled(name, text)]
        end = self.thought.partition("{thought}")[0] if self.thinks else self.response
        return TemplateText([*parts, (end, self.special_tokens)])

    def answer(self, response: str, *, thought: str = "") -> TemplateText:
        """Return the text that the model learns to write after the prompt. `encode_prompt` gives its ids."""
        if not self.thinks:
            return TemplateText([(response, False)])
        between = self.thought.partition("{thought}")[2] + self.response
        return TemplateText([(thought, False), (between, self.special_tokens), (response, False)])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the template into a model folder, and the same as a chat template, which transformers reads."""
        with whole_folder(folder) as new:
            atomic_write_json(new / TEMPLATE_FILE, dataclasses.asdict(self))
            atomic_write_text(new / CHAT_TEMPLATE_FILE, self.to_jinja())

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
