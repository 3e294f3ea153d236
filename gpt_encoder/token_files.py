"""Read the special tokens, added tokens and roles in the files beside a vocabulary, as transformers does.

`tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` have them, and `config.json` may name the class of
the tokenizer. This module knows these files, not the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_config.errors import VocabularyError
from gpt_config.file_reading import read_json
from gpt_config.lfs import pointer_message
from gpt_encoder.added_tokens import AddedToken
from gpt_encoder.interface import EOT_TOKEN

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# transformers gives these roles to `<|endoftext|>` if the files of a GPT2Tokenizer do not name a token.
_DEFAULT_ROLES = ("bos_token", "eos_token", "unk_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")

_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
# Classes that take everything from tokenizer.json.
_GENERAL_CLASSES = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
_GPT2_FILES = ("tokenizer.json", "vocab.json", "encoder.json", "char_vocab.json")
# Vocabulary files of other algorithms.
_OTHER_FILES = {
    "vocab.txt": "a WordPiece vocabulary, as of BertTokenizer",
    "spiece.model": "a SentencePiece model, as of T5Tokenizer",
    "sentencepiece.bpe.model": "a SentencePiece model",
    "tokenizer.model": "a SentencePiece model",
}


@dataclass(frozen=True)
class NamedTokens:
    """The tokens that the files beside a vocabulary name.

    `roles`: the text of the token in each role. `extra`: special tokens in no role. `special`: the texts of all special
    tokens. `added`: the added tokens with ids, by their texts.
    """

    roles: dict[str, str]
    extra: tuple[str, ...]
    special: frozenset[str]
    added: dict[str, AddedToken]


def read_named_tokens(folder: Path, entries: Iterable[AddedToken] = ()) -> NamedTokens:
    """The tokens that the files in `folder` name. `entries`: those of `added_tokens` in its tokenizer.json.

    As in transformers, special_tokens_map.json overrides tokenizer_config.json, but is not read if the latter has
    `added_tokens_decoder`. Raises VocabularyError for a broken file and for a token with two ids.
    """
    config_path, map_path, added_path = (
        folder / name for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    config = read_json_object(config_path) if config_path.is_file() else {}
    named = dict(config)
    if "added_tokens_decoder" not in config and map_path.is_file():
        named |= read_json_object(map_path)
    roles, extra, special = _names(named, _class_of(folder, config))
    added: dict[str, AddedToken] = {}
    _add(added, entries, special, folder / "tokenizer.json")
    decoder = config.get("added_tokens_decoder") or {}
    try:
        by_id = [{"id": int(token_id), **entry} for token_id, entry in decoder.items()]
    except (AttributeError, TypeError, ValueError):
        raise VocabularyError(f"{config_path}: added_tokens_decoder must map ids to tokens") from None
    _add(added, added_tokens_of(config_path, by_id), special, config_path)
    if added_path.is_file():
        # Tokens without another entry. As in transformers, the special ones are found first.
        others = [
            AddedToken(text, token_id, text in special, normalized=text not in special)
            for text, token_id in read_json_object(added_path).items()
            if text not in added or added[text].token_id != token_id
        ]
        _add(added, others, special, added_path)
    return NamedTokens(roles, extra, frozenset(special), added)


def _class_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The tokenizer class that `config` (tokenizer_config.json), or else config.json, names."""
    if isinstance(config.get("tokenizer_class"), str):
        return str(config["tokenizer_class"])
    try:
        content = read_json(folder / "config.json", "utf-8-sig")
        name = content.get("tokenizer_class")
    except (OSError, ValueError, RecursionError, AttributeError):  # loading the model reports the error
        return None
    return name if isinstance(name, str) else None


def _names(named: Mapping[str, Any], class_name: str | None) -> tuple[dict[str, str], tuple[str, ...], set[str]]:
    """The roles, the special tokens in no role, and the texts of all special tokens."""
    roles, extra, others = {}, [], set()
    for key, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key in _LISTS:
            tokens = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
            texts = (token.get("content") if isinstance(token, dict) else token for token in tokens)
            extra += [text for text in texts if isinstance(text, str) and text and text not in extra]
        elif key in _ROLES and isinstance(text, str) and text:
            roles[key] = text
        elif key.endswith("_token") and isinstance(text, str) and text:
            others.add(text)
    if class_name is None or class_name in _GPT2_CLASSES:
        roles |= {role: EOT_TOKEN for role in _DEFAULT_ROLES if role not in named}
    return roles, tuple(extra), {*roles.values(), *extra, *others, EOT_TOKEN}


def _add(added: dict[str, AddedToken], tokens: Iterable[AddedToken], special: set[str], path: Path) -> None:
    for token in tokens:
        known = added.setdefault(token.text, token)
        if known.token_id != token.token_id:
            raise VocabularyError(
                f"{path}: the added token {token.text!r} has the id {token.token_id}, but {known.token_id} in another file: "
                "use the same id in both"
            )
        if token.is_special:
            special.add(token.text)


def added_tokens_of(path: Path, entries: Any) -> list[AddedToken]:
    """The added tokens in a list of a file. Raises VocabularyError if one has no id or text."""
    if not isinstance(entries, list):
        raise VocabularyError(f"{path}: added_tokens must be a list")
    tokens = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or "id" not in entry:
            raise VocabularyError(f"{path}: every added token needs an id and a content")
        is_special = entry.get("special") is True
        tokens.append(
            AddedToken(
                entry["content"],
                entry["id"],
                is_special,
                lstrip=entry.get("lstrip") is True,
                rstrip=entry.get("rstrip") is True,
                single_word=entry.get("single_word") is True,
                normalized=bool(entry.get("normalized", not is_special)),
            )
        )
    return tokens


def other_tokenizer(folder: Path) -> str | None:
    """The error if the files in `folder` name another class of tokenizer, or are those of another algorithm; else None."""
    config_path = folder / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    name = _class_of(folder, config)
    if name is not None and name not in (*_GPT2_CLASSES, *_GENERAL_CLASSES):
        path = config_path if isinstance(config.get("tokenizer_class"), str) else folder / "config.json"
        return (
            f"{path} names the tokenizer {name}, which is not GPT-2's byte-level BPE: the ids would be wrong; use a model "
            "with GPT-2's tokenizer, or name GPT2Tokenizer there if the vocabulary is of this kind"
        )
    if any((folder / file_name).is_file() for file_name in _GPT2_FILES):
        return None
    for file_name, kind in _OTHER_FILES.items():
        if (folder / file_name).is_file():
            return f"{folder / file_name} is {kind}, not GPT-2's byte-level BPE: use a model with GPT-2's tokenizer"
    return None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises VocabularyError if the file is missing or contains something else."""
    try:
        content = read_json(path, "utf-8-sig")
    except OSError as error:
        raise VocabularyError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        message = pointer_message(path) or f"{path} is not valid JSON ({error}): restore or download the file again"
        raise VocabularyError(message) from None
    if not isinstance(content, dict):
        raise VocabularyError(f"{path} must contain a JSON object, not {type(content).__name__}")
    return content
