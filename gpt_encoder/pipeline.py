"""The steps of a `tokenizer.json` around its model: what equals GPT-2's is accepted, anything else is an error.

A normalizer changes the text, a pre-tokenizer splits it into pieces, and a post-processor adds ids at its ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt_config.errors import VocabularyError

# GPT-2's pattern in the spellings of OpenAI, tiktoken and tokenizers. All split every text at the same places.
_LETTERS_AND_NUMBERS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PATTERNS = (
    rf"'(?:[sdmt]|ll|ve|re)|{_LETTERS_AND_NUMBERS}",
    rf"'s|'t|'re|'ve|'m|'ll|'d|{_LETTERS_AND_NUMBERS}",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
)
# The ids of a text: those of the first list, the text's own, those of the second list.
Ends = tuple[list[int], list[int]]


def check_pipeline(path: Path, content: dict[str, Any]) -> None:
    """Raise VocabularyError, which says what differs, if ids would differ from GPT-2's.

    `content` is that of the file `path`.
    """
    for normalizer in _steps(content.get("normalizer"), "normalizers"):
        raise VocabularyError(
            f"{path}: the normalizer {_type(normalizer)} changes the text, which GPT-2 does not: use a tokenizer without one"
        )
    model = content["model"]
    for key, required in (
        ("dropout", None),
        ("continuing_subword_prefix", None),
        ("end_of_word_suffix", None),
        ("byte_fallback", False),
        ("ignore_merges", False),
    ):
        value = model.get(key, required)
        if value != required and not (required is None and value in ("", 0)):
            raise _differs(path, f"model has {key}={value!r}, not {required!r}")
    _check_pre_tokenizer(path, _steps(content.get("pre_tokenizer"), "pretokenizers"))


def _check_pre_tokenizer(path: Path, steps: list[Any]) -> None:
    names = [_type(step) for step in steps]
    if names not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise _differs(path, f"the pre_tokenizer is {' and '.join(names) or 'missing'}, not GPT-2's ByteLevel")
    byte_level = steps[-1]
    if byte_level.get("add_prefix_space", True):  # the default of tokenizers
        raise _differs(path, "pre_tokenizer has add_prefix_space=True, not False")
    if names == ["ByteLevel"]:
        if not byte_level.get("use_regex", True):
            raise _differs(path, "pre_tokenizer has use_regex=False, not True")
        return
    split = steps[0]
    pattern = split.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if regex not in _PATTERNS:
        raise _differs(path, f"the pre_tokenizer splits at {pattern!r}, which is not GPT-2's pattern")
    behavior, is_inverted = split.get("behavior"), bool(split.get("invert"))
    if behavior != "Isolated" and not (behavior == "Removed" and is_inverted):
        raise _differs(path, f"the pre_tokenizer has behavior={behavior!r} and invert={is_inverted}, not 'Isolated'")


def ends_of(path: Path, post_processor: Any) -> Ends:
    """The ids that a post-processor adds before and after a text. VocabularyError if it does anything else."""
    first: list[int] = []
    last: list[int] = []
    for step in _steps(post_processor, "processors"):
        name = _type(step)
        if name == "ByteLevel":  # it changes offsets only
            continue
        try:
            before, after = _template_ends(step) if name == "TemplateProcessing" else _pair_ends(step, name)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise _differs(path, f"the post_processor {name} is not one that adds tokens before or after a text") from None
        first, last = before + first, last + after
    return first, last


def _template_ends(step: dict[str, Any]) -> Ends:
    ends: Ends = [], []
    n_texts = 0
    for item in step["single"]:
        if "Sequence" in item:
            n_texts += 1
        else:
            ends[n_texts].extend(_whole(step["special_tokens"][item["SpecialToken"]["id"]]["ids"]))
    if n_texts != 1:
        raise ValueError
    return ends


def _pair_ends(step: dict[str, Any], name: str) -> Ends:
    """The ends of the two post-processors that put one token before and one after a text."""
    if name not in ("RobertaProcessing", "BertProcessing"):
        raise ValueError
    return _whole([step["cls"][1]]), _whole([step["sep"][1]])


def _whole(ids: list[Any]) -> list[int]:
    if not all(type(token_id) is int for token_id in ids):
        raise ValueError
    return list(ids)


def template(first: list[tuple[str, int]], last: list[tuple[str, int]]) -> dict[str, Any] | None:
    """The post-processor that adds these tokens, each a text and an id; None if there are none."""
    if not first and not last:
        return None

    def tokens(some: list[tuple[str, int]], kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": text, "type_id": kind}} for text, _ in some]

    def whole(text: str, kind: int) -> list[dict[str, Any]]:
        return [*tokens(first, kind), {"Sequence": {"id": text, "type_id": kind}}, *tokens(last, kind)]

    return {
        "type": "TemplateProcessing",
        "single": whole("A", 0),
        "pair": whole("A", 0) + whole("B", 1),
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]} for text, token_id in first + last},
    }


def _steps(value: Any, key: str) -> list[Any]:
    """The steps of a part of the pipeline: a Sequence contains several, also other Sequences; None is no step."""
    if value is None:
        return []
    if isinstance(value, dict) and value.get("type") == "Sequence" and isinstance(value.get(key), list):
        return [step for inner in value[key] for step in _steps(inner, key)]
    return [value]


def _type(step: Any) -> str:
    return str(step.get("type")) if isinstance(step, dict) else repr(step)


def _differs(path: Path, what: str) -> VocabularyError:
    return VocabularyError(f"{path}: {what}: the ids would differ from GPT-2's")
