"""Read and write vocabulary files: `encoder.json` + `vocab.bpe`, `vocab.json` + `merges.txt`, and `tokenizer.json`.

The first two pairs have the same format and differ only in name. Files contain tokens in a printable alphabet with one
character per byte (`bytes_to_unicode` in OpenAI's `encoder.py`). Bytes that are printable in Latin-1 are their own
characters; the other 68 are U+0100 and the following.

This module knows the file formats and the conditions for a GPT-2 vocabulary, not how text is encoded.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from gpt_config.atomic_write import atomic_write_json, atomic_write_text
from gpt_config.errors import VocabularyError
from gpt_config.file_reading import read_text, special_file
from gpt_config.lfs import pointer_message
from gpt_config.locate import TOKENIZER_FILES
from gpt_encoder.added_tokens import AddedToken
from gpt_encoder.interface import EOT_TOKEN
from gpt_encoder.pipeline import check_pipeline, ends_of, template
from gpt_encoder.token_files import (
    NamedTokens,
    added_tokens_of,
    other_tokenizer,
    read_json_object,
    read_named_tokens,
)

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

CHARACTER_OF_BYTE: dict[int, str] = {
    **{byte: chr(byte) for byte in _PRINTABLE},
    **{byte: chr(0x100 + n) for n, byte in enumerate(_OTHERS)},
}
# The printable alphabet as one of Python's codecs.
_ALPHABET = codecs.charmap_build("".join(CHARACTER_OF_BYTE[byte] for byte in range(256)))

# The maximum number of tokens that no merge produces although two other tokens join to them. Vocabularies have a few by
# chance; with a truncated file of merges there are thousands.
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
    tokens in order of rank. `special_tokens` maps the text of each special token to its id. `added_tokens` are the ordinary
    added tokens, and the special ones that are found by more than their text.

    `roles` maps the roles of transformers, such as "bos_token", to texts of tokens; None gives bos, eos and unk to
    `<|endoftext|>`. `extra_special_tokens` are named as special without a role. `first_ids` and `last_ids` are added before
    and after each text.

    Raises VocabularyError on construction if the vocabulary is incomplete or inconsistent.
    """

    token_ids: Mapping[str, int]
    merges: list[tuple[str, str]]
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    added_tokens: tuple[AddedToken, ...] = ()
    roles: Mapping[str, str] | None = None
    extra_special_tokens: tuple[str, ...] = ()
    first_ids: tuple[int, ...] = ()
    last_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise VocabularyError("the vocabulary is empty: it needs the tokens of single bytes")
        for token, token_id in chain(self.token_ids.items(), self._added_ids().items()):
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < _MAX_IDS:
                raise VocabularyError(
                    f"token {token!r} has the id {token_id!r}: ids must be whole numbers from 0 to {_MAX_IDS - 1}"
                )
        self._check_tokens()
        made = set(map("".join, self.merges))
        unmade = sum(map(self._has_parts, self.token_ids.keys() - made - self._added_ids().keys()))
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

    @property
    def role_tokens(self) -> dict[str, str]:
        """The text of the token in each role."""
        if self.roles is not None:
            return dict(self.roles)
        return dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT_TOKEN) if EOT_TOKEN in self.special_tokens else {}

    def _added_ids(self) -> dict[str, int]:
        return {**{token.text: token.token_id for token in self.added_tokens}, **self.special_tokens}

    def _has_parts(self, token: str) -> bool:
        """Whether two tokens of the vocabulary join to `token`, as those of a merge do."""
        return any(token[:at] in self.token_ids and token[at:] in self.token_ids for at in range(1, len(token)))

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
        for token, token_id in self._added_ids().items():
            if not isinstance(token, str) or not token or token != token.encode("utf-8", "ignore").decode("utf-8"):
                raise VocabularyError(
                    f"added token {token!r} must be a string of at least one character, without surrogates"
                )
            if self.token_ids.get(token, token_id) != token_id:
                raise VocabularyError(
                    f"added token {token!r} has the id {token_id}, but {self.token_ids[token]} in the vocabulary: "
                    "use the same id in both"
                )
            if token_of_id.setdefault(token_id, token) != token:
                raise VocabularyError(
                    f"added token {token!r} has the id {token_id}, which {token_of_id[token_id]!r} has too: use another id"
                )


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary in `folder`, from `tokenizer.json` if it exists, as in transformers, otherwise from the other files.

    Raises VocabularyError, which names the file and its fault, or the setting that differs from GPT-2.
    """
    if name := special_file(folder, TOKENIZER_FILES):
        raise VocabularyError(f"{folder / name} is not a regular file: replace it with the tokenizer's own file")
    if other := other_tokenizer(folder):
        raise VocabularyError(other)
    config = folder / "tokenizer_config.json"
    settings = read_json_object(config) if config.is_file() else {}
    if settings.get("add_prefix_space"):
        raise VocabularyError(f"{config}: add_prefix_space is true, not false: the ids would differ from GPT-2's")
    if (folder / "tokenizer.json").is_file():
        return _read_tokenizer_json(folder / "tokenizer.json")
    for vocab_name, merges_name in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab_name).is_file() and (folder / merges_name).is_file():
            vocab, named = folder / vocab_name, read_named_tokens(folder)
            token_ids, pairs = read_json_object(vocab), _read_merges(folder / merges_name)
            ends = [
                [_id_of_role(vocab, token_ids, named, role)] if settings.get(f"add_{role}") is True else []
                for role in ("bos_token", "eos_token")
            ]
            return _checked(vocab, token_ids, pairs, named, *ends)
    raise VocabularyError(
        f"{folder} has no tokenizer files: it needs tokenizer.json, or vocab.json "
        "with merges.txt, or encoder.json with vocab.bpe"
    )


def _id_of_role(path: Path, token_ids: Mapping[str, int], named: NamedTokens, role: str) -> int:
    token = named.roles.get(role, "")
    if token in named.added:
        return named.added[token].token_id
    if token not in token_ids:
        raise VocabularyError(
            f"{path.parent / 'tokenizer_config.json'}: add_{role} is true, but the {role} {token!r} has no id: "
            "name one of the vocabulary"
        )
    return token_ids[token]


def read_vocab_and_merges(vocab: Path, merges: Path) -> Vocabulary:
    """The vocabulary in `vocab.json` and `merges.txt`, whatever the files' names. `<|endoftext|>` is a special token.

    Raises VocabularyError if a file cannot be read or the vocabulary is invalid.
    """
    token_ids = read_json_object(vocab)
    special = {EOT_TOKEN: token_ids[EOT_TOKEN]} if EOT_TOKEN in token_ids else {}
    try:
        return Vocabulary(token_ids, _read_merges(merges), special)
    except VocabularyError as error:
        raise VocabularyError(f"{vocab}: {error}") from None


def _read_merges(merges: Path) -> list[tuple[str, str]]:
    if message := pointer_message(merges):
        raise VocabularyError(message)
    try:
        # Not splitlines(): it would also split at the other line separators of Unicode.
        lines = read_text(merges, "utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise VocabularyError(f"cannot read {merges}: {error}") from None
    first = 1 if lines[0].startswith("#version") else 0
    # Empty lines are skipped, because the line end after the last merge is optional.
    return _pairs(merges, [line.split(" ") for line in lines[first:] if line])


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Write the four files of a tokenizer that this package and transformers read."""
    atomic_write_json(folder / "tokenizer.json", _tokenizer_json(vocabulary))
    atomic_write_json(folder / "vocab.json", dict(vocabulary.token_ids), indent=None)
    atomic_write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, vocabulary.merges), ""]))
    atomic_write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            # transformers gives these roles to <|endoftext|> unless a token or null is named.
            **dict.fromkeys(("bos_token", "eos_token", "unk_token")),
            **vocabulary.role_tokens,
            **({"additional_special_tokens": list(extra)} if (extra := vocabulary.extra_special_tokens) else {}),
            "clean_up_tokenization_spaces": False,
        },
    )


def _tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {text: AddedToken(text, token_id) for text, token_id in vocabulary.special_tokens.items()}
    added |= {token.text: token for token in vocabulary.added_tokens}
    text_of = {token_id: text for text, token_id in vocabulary.token_ids.items()}
    text_of |= {token.token_id: token.text for token in added.values()}
    ends = ([(text_of[end], end) for end in ids] for ids in (vocabulary.first_ids, vocabulary.last_ids))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_entry(token) for token in sorted(added.values(), key=lambda token: token.token_id)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": template(*ends),
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


def _entry(token: AddedToken) -> dict[str, Any]:
    return {
        "id": token.token_id,
        "content": token.text,
        "single_word": token.single_word,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "normalized": token.normalized,
        "special": token.is_special,
    }


def _read_tokenizer_json(path: Path) -> Vocabulary:
    content = read_json_object(path)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise VocabularyError(f"{path} does not contain a BPE model: use a tokenizer with GPT-2's byte-level BPE")
    check_pipeline(path, content)
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise VocabularyError(f"{path} has no list of merges: restore or download the file again")
    # A merge is "left right" in files from before 2024, ["left", "right"] in later ones.
    pairs = _pairs(path, [merge.split(" ") if isinstance(merge, str) else merge for merge in merges])
    named = read_named_tokens(path.parent, added_tokens_of(path, content.get("added_tokens") or []))
    return _checked(path, model["vocab"], pairs, named, *ends_of(path, content.get("post_processor")))


def _pairs(path: Path, merges: list[Any]) -> list[tuple[str, str]]:
    for number, merge in enumerate(merges, start=1):
        if not (isinstance(merge, list) and len(merge) == 2 and isinstance(merge[0], str) and isinstance(merge[1], str)):
            raise VocabularyError(f"{path}: merge {number} is {merge!r}: it must be two tokens separated by one blank")
    return [(left, right) for left, right in merges]


def _checked(
    path: Path,
    token_ids: Mapping[str, int],
    merges: list[tuple[str, str]],
    named: NamedTokens,
    first_ids: list[int],
    last_ids: list[int],
) -> Vocabulary:
    """The vocabulary. A token that is named as special is one if it has an id, in the vocabulary or as an added token."""
    added = [replace(token, is_special=text in named.special) for text, token in named.added.items()]
    special = {text: token_ids[text] for text in sorted(named.special) if text in token_ids}
    special |= {token.text: token.token_id for token in added if token.is_special}
    try:
        # Other ids than numbers are an error of Vocabulary.
        known = {i for i in (*token_ids.values(), *(token.token_id for token in added)) if isinstance(i, int)}
        for token_id in (*first_ids, *last_ids):
            if token_id not in known:
                raise VocabularyError(
                    f"the post_processor adds the id {token_id}, which no token has: restore or download the file again"
                )
        return Vocabulary(
            token_ids,
            merges,
            dict(sorted(special.items(), key=lambda item: item[1] if isinstance(item[1], int) else -1)),
            tuple(token for token in added if token != AddedToken(token.text, token.token_id)),
            named.roles,
            named.extra,
            tuple(first_ids),
            tuple(last_ids),
        )
    except VocabularyError as error:
        raise VocabularyError(f"{path}: {error}") from None


def byte_token_ids(token_ids: Mapping[str, int]) -> list[int]:
    """The ids of the bytes 0 to 255, in the order of the bytes. A byte that has no token gets an id that no token has."""
    unused = count(1 + max(token_ids.values()))
    return [token_ids[c] if (c := CHARACTER_OF_BYTE[byte]) in token_ids else next(unused) for byte in range(256)]


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
