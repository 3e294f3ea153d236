"""Read and write vocabulary files: `encoder.json` + `vocab.bpe`, `vocab.json` + `merges.txt`, and `tokenizer.json`.

The first two pairs have the same format and differ only in name. Files contain tokens in a printable alphabet with one
character per byte (`bytes_to_unicode` in OpenAI's `encoder.py`). Bytes that are printable in Latin-1 are their own
characters; the other 68 are U+0100 and the following.

This module knows the file formats and the conditions for a GPT-2 vocabulary, not how text is encoded.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from gpt_config.atomic_write import atomic_write_json, atomic_write_text
from gpt_config.errors import VocabularyError
from gpt_config.file_reading import read_json, read_text, special_file
from gpt_config.locate import TOKENIZER_FILES
from gpt_encoder.interface import EOT_TOKEN

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

CHARACTER_OF_BYTE: dict[int, str] = {
    **{byte: chr(byte) for byte in _PRINTABLE},
    **{byte: chr(0x100 + n) for n, byte in enumerate(_OTHERS)},
}
# The printable alphabet as one of Python's codecs.
_ALPHABET = codecs.charmap_build("".join(CHARACTER_OF_BYTE[byte] for byte in range(256)))

# The maximum number of tokens that no merge produces. Vocabularies have a few, such as <pad>; with a truncated file of
# merges there are thousands.
_UNMADE_TOKENS = 100

# Ids are packed as 32-bit unsigned ints.
_MAX_IDS = 1 << 32


def token_to_bytes(token: str) -> bytes:
    """The bytes of a token in the printable alphabet. Raises UnicodeEncodeError for a character outside the alphabet."""
    return codecs.charmap_encode(token, "strict", _ALPHABET)[0]


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary as in its files.

    `token_ids` maps tokens in the printable alphabet to their ids and may include special tokens. `merges` are pairs of such
    tokens in order of rank. `special_tokens` maps the text of each special token to its id.

    Raises VocabularyError on construction if the vocabulary is incomplete or inconsistent.
    """

    token_ids: Mapping[str, int]
    merges: list[tuple[str, str]]
    special_tokens: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise VocabularyError("the vocabulary is empty: it needs at least the 256 byte tokens")
        for token, token_id in chain(self.token_ids.items(), self.special_tokens.items()):
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < _MAX_IDS:
                raise VocabularyError(
                    f"token {token!r} has the id {token_id!r}: ids must be whole numbers from 0 to {_MAX_IDS - 1}"
                )
        self._check_tokens()
        missing = [byte for byte, character in CHARACTER_OF_BYTE.items() if character not in self.token_ids]
        if missing:
            raise VocabularyError(
                f"the vocabulary lacks {len(missing)} of the 256 byte tokens (first: byte {missing[0]:#04x}): "
                "without them some texts cannot be encoded; use a byte-level BPE vocabulary"
            )
        made = set(map("".join, self.merges))
        unmade = sum(len(token) > 1 for token in self.token_ids.keys() - made - self.special_tokens.keys())
        if unmade > _UNMADE_TOKENS:
            raise VocabularyError(
                f"{unmade} tokens are the result of none of the {len(self.merges)} merges: the merges are truncated or "
                "belong to another vocabulary; download the files again"
            )
        lacking = {*chain.from_iterable(self.merges), *made} - self.token_ids.keys()
        if lacking:
            raise VocabularyError(
                f"the merges need the token {min(lacking)!r}, which the vocabulary lacks: use two files of one vocabulary"
            )

    def _check_tokens(self) -> None:
        token_of_id: dict[int, str] = {}
        for token, token_id in self.token_ids.items():
            if token_of_id.setdefault(token_id, token) != token:
                raise VocabularyError(
                    f"the tokens {token_of_id[token_id]!r} and {token!r} both have the id {token_id}: give each its own id"
                )
        try:
            "".join(self.token_ids).encode("utf-8")
        except UnicodeEncodeError:
            raise VocabularyError(
                "a token contains a surrogate, which no text has: restore or download the file again"
            ) from None
        for token, token_id in self.special_tokens.items():
            if not isinstance(token, str) or not token or token != token.encode("utf-8", "ignore").decode("utf-8"):
                raise VocabularyError(
                    f"special token {token!r} must be a string of at least one character, without surrogates"
                )
            if self.token_ids.get(token, token_id) != token_id:
                raise VocabularyError(
                    f"special token {token!r} has the id {token_id}, but {self.token_ids[token]} in the vocabulary: "
                    "use the same id in both"
                )
            if token_of_id.setdefault(token_id, token) != token:
                raise VocabularyError(
                    f"special token {token!r} has the id {token_id}, which {token_of_id[token_id]!r} has too: use another id"
                )


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary in `folder`, from `tokenizer.json` if it exists, as in transformers, otherwise from the other files.

    A post-processor, which adds tokens at the ends of a text, is ignored because `encode` adds none. Raises VocabularyError,
    which names the file and its fault, or the setting that differs from GPT-2.
    """
    if name := special_file(folder, TOKENIZER_FILES):
        raise VocabularyError(f"{folder / name} is not a regular file: replace it with the tokenizer's own file")
    _refuse_other_behaviour(folder)
    if (folder / "tokenizer.json").is_file():
        return _read_tokenizer_json(folder / "tokenizer.json", _read_added_tokens(folder))
    for vocab_name, merges_name in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab_name).is_file() and (folder / merges_name).is_file():
            return read_vocab_and_merges(folder / vocab_name, folder / merges_name, _read_added_tokens(folder))
    raise VocabularyError(
        f"{folder} has no tokenizer files: it needs tokenizer.json, or vocab.json with merges.txt, "
        "or encoder.json with vocab.bpe"
    )


def read_vocab_and_merges(vocab: Path, merges: Path, added_tokens: Mapping[str, int] | None = None) -> Vocabulary:
    """The vocabulary in `vocab.json` and `merges.txt`, whatever the files' names. `<|endoftext|>` is a special token.

    Raises VocabularyError if a file cannot be read or the vocabulary is invalid.
    """
    token_ids = _read_json_object(vocab)
    special_tokens = dict(added_tokens or {})
    if EOT_TOKEN in token_ids:
        special_tokens.setdefault(EOT_TOKEN, token_ids[EOT_TOKEN])
    try:
        # Not splitlines(): it would also split at the other line separators of Unicode.
        lines = read_text(merges, "utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise VocabularyError(f"cannot read {merges}: {error}") from None
    first = 1 if lines[0].startswith("#version") else 0
    # Empty lines are skipped, because the line end after the last merge is optional.
    pairs = _pairs(merges, [line.split(" ") for line in lines[first:] if line])
    return _checked(vocab, token_ids, pairs, special_tokens)


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> list[str]:
    """Write the four files of a tokenizer that this package and transformers read. Returns their names."""
    eot = EOT_TOKEN if EOT_TOKEN in vocabulary.special_tokens else None
    # This file comes first because readers prefer it: after it is written, they load the new tokenizer.
    atomic_write_json(folder / "tokenizer.json", _tokenizer_json(vocabulary))
    atomic_write_json(folder / "vocab.json", dict(vocabulary.token_ids), indent=None)
    atomic_write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, vocabulary.merges), ""]))
    atomic_write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "bos_token": eot,
            "eos_token": eot,
            "unk_token": eot,
            "clean_up_tokenization_spaces": False,
        },
    )
    return ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"]


def _tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    by_id = sorted(vocabulary.special_tokens.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, "content": token, **flags} for token, token_id in by_id],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocabulary.token_ids),
            "merges": [list(pair) for pair in vocabulary.merges],
        },
    }


def _read_tokenizer_json(path: Path, added_tokens: Mapping[str, int]) -> Vocabulary:
    content = _read_json_object(path)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise VocabularyError(f"{path} does not contain a BPE model: use a tokenizer with GPT-2's byte-level BPE")
    _refuse_other_pipeline(path, content, model)
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise VocabularyError(f"{path} has no list of merges: restore or download the file again")
    # A merge is "left right" in files from before 2024, ["left", "right"] in later ones.
    pairs = _pairs(path, [merge.split(" ") if isinstance(merge, str) else merge for merge in merges])
    special_tokens = {**_special_tokens_of(path, content.get("added_tokens") or []), **added_tokens}
    if EOT_TOKEN in model["vocab"]:
        special_tokens.setdefault(EOT_TOKEN, model["vocab"][EOT_TOKEN])
    return _checked(path, model["vocab"], pairs, special_tokens)


def _refuse_other_pipeline(path: Path, content: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise VocabularyError for a setting of `tokenizer.json` with which ids would differ from GPT-2's."""
    pre_tokenizer = content.get("pre_tokenizer")
    if not isinstance(pre_tokenizer, dict) or pre_tokenizer.get("type") != "ByteLevel":
        raise VocabularyError(f"{path}: the pre_tokenizer is not GPT-2's ByteLevel: the ids would differ from GPT-2's")
    for owner, settings, key, required in (
        ("pre_tokenizer", pre_tokenizer, "add_prefix_space", False),
        ("pre_tokenizer", pre_tokenizer, "use_regex", True),
        ("model", model, "dropout", None),
        ("model", model, "continuing_subword_prefix", None),
        ("model", model, "end_of_word_suffix", None),
        ("model", model, "byte_fallback", False),
        ("model", model, "ignore_merges", False),
        ("tokenizer", content, "normalizer", None),
    ):
        value = settings.get(key, required)
        if value != required and not (required is None and value in ("", 0)):
            raise VocabularyError(
                f"{path}: {owner} has {key}={value!r}, not {required!r}: the ids would differ from GPT-2's"
            )


def _refuse_other_behaviour(folder: Path) -> None:
    """Raise VocabularyError for the one setting of `tokenizer_config.json` that changes the ids of ordinary text."""
    path = folder / "tokenizer_config.json"
    if path.is_file() and _read_json_object(path).get("add_prefix_space"):
        raise VocabularyError(f"{path}: add_prefix_space is true, not false: the ids would differ from GPT-2's")


def _read_added_tokens(folder: Path) -> dict[str, int]:
    """The ids of the special tokens in the other files of `folder`, by their texts."""
    tokens: dict[str, int] = {}
    config_path, added_path = folder / "tokenizer_config.json", folder / "added_tokens.json"
    if config_path.is_file():
        by_id = _read_json_object(config_path).get("added_tokens_decoder") or {}
        try:
            entries = [{"id": int(token_id), **entry} for token_id, entry in by_id.items()]
        except (AttributeError, TypeError, ValueError):
            raise VocabularyError(f"{config_path}: added_tokens_decoder must map ids to tokens") from None
        tokens |= _special_tokens_of(config_path, entries)
    if added_path.is_file():
        named_special = {*_names_of_special_tokens(folder), *tokens, EOT_TOKEN}
        entries = [
            {"id": token_id, "content": token, "special": token in named_special}
            for token, token_id in _read_json_object(added_path).items()
        ]
        tokens |= _special_tokens_of(added_path, entries)
    return tokens


def _names_of_special_tokens(folder: Path) -> set[str]:
    """The texts of the special tokens in `special_tokens_map.json` and `tokenizer_config.json`, such as pad_token."""
    names: set[str] = set()
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        for key, value in (_read_json_object(path) if path.is_file() else {}).items():
            for token in value if isinstance(value, list) else [value]:
                text = token.get("content") if isinstance(token, dict) else token
                if key.endswith(("_token", "_special_tokens")) and isinstance(text, str):
                    names.add(text)
    return names


def _special_tokens_of(path: Path, entries: Any) -> dict[str, int]:
    """The ids of a file's added tokens by their texts. Raises VocabularyError for one that is not special.

    Added tokens that are not special would also split ordinary text.
    """
    tokens = {}
    if not isinstance(entries, list):
        raise VocabularyError(f"{path}: added_tokens must be a list")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or "id" not in entry:
            raise VocabularyError(f"{path}: every added token needs an id and a content")
        if any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise VocabularyError(
                f"{path}: the added token {entry['content']!r} has lstrip, rstrip or single_word, which this package does "
                "not support: set these to false"
            )
        if entry.get("special") is not True and entry["content"] != EOT_TOKEN:
            raise VocabularyError(
                f"{path}: the added token {entry['content']!r} is not special, so it would change the ids of ordinary text: "
                "mark it as special, or remove it"
            )
        tokens[entry["content"]] = entry["id"]
    return tokens


def _pairs(path: Path, merges: list[Any]) -> list[tuple[str, str]]:
    for number, merge in enumerate(merges, start=1):
        if not (isinstance(merge, list) and len(merge) == 2 and isinstance(merge[0], str) and isinstance(merge[1], str)):
            raise VocabularyError(f"{path}: merge {number} is {merge!r}: it must be two tokens separated by one blank")
    return [(left, right) for left, right in merges]


def _checked(path: Path, token_ids: Mapping[str, int], merges: list[tuple[str, str]], special: dict[str, int]) -> Vocabulary:
    try:
        return Vocabulary(token_ids, merges, special)
    except VocabularyError as error:
        raise VocabularyError(f"{path}: {error}") from None


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, "utf-8-sig")
    except OSError as error:
        raise VocabularyError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise VocabularyError(f"{path} is not valid JSON ({error}): restore or download the file again") from None
    if not isinstance(content, dict):
        raise VocabularyError(f"{path} must contain a JSON object, not {type(content).__name__}")
    return content


def byte_token_ids(token_ids: Mapping[str, int]) -> list[int]:
    """The ids of the bytes 0 to 255, in the order of the bytes."""
    return [token_ids[CHARACTER_OF_BYTE[byte]] for byte in range(256)]


def tokens_beyond_ascii(token_ids: Mapping[str, int]) -> list[bytes]:
    """The bytes of all tokens that are not ASCII text. No merge makes a non-ASCII token that is not in this list."""
    blank = CHARACTER_OF_BYTE[ord(" ")]
    tokens = [token for token in token_ids if not token.isascii() and not token.lstrip(blank).isascii()]
    return list(bytes_by_id({token: token_ids[token] for token in tokens}, {}).values())


def bytes_by_id(token_ids: Mapping[str, int], special_tokens: Mapping[str, int]) -> dict[int, bytes]:
    """The bytes of every id. A token outside the printable alphabet is special: its bytes are its text in UTF-8."""
    table: dict[int, bytes] = {}
    for token, token_id in token_ids.items():
        try:
            table[token_id] = token_to_bytes(token)
        except UnicodeEncodeError:
            table[token_id] = token.encode("utf-8", errors="replace")
    table.update((token_id, token.encode("utf-8", errors="replace")) for token, token_id in special_tokens.items())
    return table
