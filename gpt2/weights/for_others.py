"""Files beside a model that transformers writes: generation_config.json, the chat template, fields of tokenizer_config.json.

It depends on folders and configs, not on tokenizers or weights.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from gpt_config.atomic_write import atomic_write_json, atomic_write_text
from gpt_config.file_reading import read_text
from gpt_config.model_config import GPT2Config

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


def describe_tokenizer(folder: Path, config: GPT2Config, *, needs_padding: bool = False) -> None:
    """Add to the tokenizer's files in `folder` what transformers needs to cut texts to the model's positions.

    With `needs_padding`, the end token is also the padding, unless there is one: transformers computes no batches without.
    Nothing is written if the folder has no tokenizer_config.json.
    """
    path = folder / TOKENIZER_CONFIG_FILE
    if (values := _object(path)) is None:
        return
    changes: dict[str, Any] = {"model_max_length": config.n_positions}
    if needs_padding and values.get("pad_token") is None:
        changes["pad_token"] = values.get("eos_token")
    atomic_write_json(path, {**values, **changes})


def write_chat_template(folder: Path, source: Path) -> None:
    """Write the chat template of the folder `source`, if it has one, into the file that transformers writes."""
    template = (_object(source / TOKENIZER_CONFIG_FILE) or {}).get("chat_template")
    with contextlib.suppress(OSError, ValueError):  # no file, or none that a reader would accept
        template = read_text(source / CHAT_TEMPLATE_FILE)
    if isinstance(template, list):  # several by name
        template = next((entry.get("template") for entry in template if _is_default(entry)), None)
    if isinstance(template, str):
        atomic_write_text(folder / CHAT_TEMPLATE_FILE, template)


def _is_default(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("name") == "default"


def write_generation_config(folder: Path, config: GPT2Config, source: Path | None = None) -> None:
    """Write generation_config.json: the settings of the folder `source`, if it has any, and the bos and eos of `config`."""
    values = None if source is None else _object(source / GENERATION_CONFIG_FILE)
    # The file decides where a text ends, so it must say what the config says.
    ends = {name: config.to_dict()[name] for name in ("bos_token_id", "eos_token_id")}
    atomic_write_json(folder / GENERATION_CONFIG_FILE, {**(values or {}), **ends})


def _object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in `path`, or None if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
