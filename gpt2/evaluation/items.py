"""Read task files (JSON Lines) into items: the texts to score, and which of them is right.

Texts are prepared as in lm-evaluation-harness, because most published figures of GPT-2 were measured with it. This module
knows the file formats and the tokenizer interface, not models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt2.data.kind import JSONL, TEXT, Kind, kind_of
from gpt2.data.records import BadRecord, records_of
from gpt2.data.source import Source
from gpt_config.errors import DataError
from gpt_encoder.interface import Tokenizer

_BRACKETS = re.compile(r"\[.*?\]")
_CONTEXTS, _ANSWERS = ("context", "query", "question"), ("answer", "gold", "label")


@dataclass(frozen=True)
class Item:
    """The texts to score, each as (context, continuation), and the index of the right one, `answer`.

    `lengths` are the lengths of the choices in characters, without the delimiter that joins them to the context.
    """

    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    answer: int = 0


def read_items(path: str | os.PathLike[str], task: str, *, delimiter: str = " ") -> list[Item]:
    """All items of a file, in order; blank lines are skipped. `task` is a key of TASKS.

    `delimiter` joins context and choice in multiple_choice. DataError if the file cannot be read, has no items or contains a
    malformed line; the message gives the line number.
    """
    items = []
    source = Source(str(path))
    kind = kind_of(source)
    if kind.name == TEXT:
        kind = Kind(JSONL, kind.encoding)  # each line that is not JSON gets an error of its own
    for place, fields in records_of(source, kind=kind):
        try:
            if isinstance(fields, BadRecord):
                raise _BadLine(str(fields))
            items.append(TASKS[task](dict(fields), delimiter))
        except _BadLine as error:
            raise DataError(f"{path}, {place}: {error}: fix or remove it") from None
    if not items:
        raise DataError(f"{path} has no items: a {task} file has one JSON object per line")
    return items


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The token ids of context and continuation, split from the ids of the whole text, as in lm-evaluation-harness.

    An empty context becomes `<|endoftext|>`, or no token if the vocabulary has none. Whitespace at the end of the context
    moves to the continuation, because a GPT-2 token includes the space before its word. If a token still crosses the
    boundary, context and continuation are encoded separately.
    """
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    if not context:
        before = [] if tokenizer.eot_token_id is None else [tokenizer.eot_token_id]
        return before, tokenizer.encode(continuation, add_special_tokens=False)
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    if whole[: len(before)] == before and len(whole) > len(before):
        return before, whole[len(before) :]
    return before, tokenizer.encode(continuation, add_special_tokens=False)


class _BadLine(Exception):
    pass


def _text(fields: dict[str, Any], name: str) -> str:
    text = fields.get(name)
    if not isinstance(text, str):
        raise _BadLine(f"the field {name!r} is {'not a string' if name in fields else 'missing'}")
    return text


def _texts(fields: dict[str, Any], name: str) -> list[str]:
    values = fields.get(name)
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(v, str) and v.strip() for v in values):
        found = "not a list of at least two non-empty strings" if name in fields else "missing"
        raise _BadLine(f"the field {name!r} is {found}")
    return values


def _one_of(fields: dict[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if name in fields:
            return name
    raise _BadLine(f"it has none of the fields {', '.join(names)}")


def _lambada(fields: dict[str, Any], _: str) -> Item:
    """The continuation is the last word with the space before it; the context is everything before that."""
    context, _, word = _text(fields, "text").rpartition(" ")
    if not context.strip() or not word.strip():
        raise _BadLine("the text has no last word after a space")
    return Item(((context, f" {word}"),), (len(word),))


def _hellaswag(fields: dict[str, Any], _: str) -> Item:
    """Rowan Zellers' original format; or, if `ctx_a` is missing, the format whose `ctx` already is the whole context."""
    if "ctx_a" in fields:
        context = f"{_text(fields, 'ctx_a')} {_text(fields, 'ctx_b').capitalize()}"
    else:
        context = _text(fields, "ctx")
    endings = [_without_markup(ending) for ending in _texts(fields, "endings")]
    if not all(endings):
        raise _BadLine("an ending contains only markup")
    label = _answer(fields, "label", endings)
    query = _without_markup(f"{_text(fields, 'activity_label')}: {context}")
    return Item(tuple((query, f" {ending}") for ending in endings), tuple(map(len, endings)), label)


def _without_markup(text: str) -> str:
    """Turn the headings and markers in the WikiHow half of HellaSwag into plain text."""
    return _BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _multiple_choice(fields: dict[str, Any], delimiter: str) -> Item:
    """One context and several choices that continue it; or several contexts and one continuation, as in Winograd schemas."""
    if "context_options" in fields:
        contexts, continuation = _texts(fields, "context_options"), _text(fields, "continuation")
        if not continuation.strip():
            raise _BadLine("the field 'continuation' is empty")
        answer = _answer(fields, _one_of(fields, _ANSWERS), contexts)
        pairs = tuple((context + delimiter, continuation) for context in contexts)
        return Item(pairs, (len(continuation),) * len(pairs), answer)
    context, choices = _text(fields, _one_of(fields, _CONTEXTS)), _texts(fields, "choices")
    answer = _answer(fields, _one_of(fields, _ANSWERS), choices)
    return Item(tuple((context + delimiter, choice) for choice in choices), tuple(map(len, choices)), answer)


def _answer(fields: dict[str, Any], name: str, choices: list[str]) -> int:
    """The index of the right choice. The file gives it as the choice's text, as its index from 0, or as a letter from A."""
    value = fields.get(name)
    if isinstance(value, str) and choices.count(value) == 1:
        return choices.index(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 9:
        value = int(value)
    elif isinstance(value, str) and len(value) == 1 and value.isascii() and value.isalpha():
        value = ord(value.upper()) - ord("A")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        raise _BadLine(f"the field {name!r} is {fields.get(name)!r}, which is none of the {len(choices)} choices")
    return value


TASKS: dict[str, Callable[[dict[str, Any], str], Item]] = {
    "lambada": _lambada,
    "hellaswag": _hellaswag,
    "multiple_choice": _multiple_choice,
}
