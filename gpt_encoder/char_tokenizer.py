"""CharTokenizer: one token per character, for small models and teaching. It has the interface of GPT2Tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import InputError, InputTypeError, VocabularyError
from gpt_config.file_reading import read_json
from gpt_config.lfs import pointer_message
from gpt_config.whole_folder import whole_folder
from gpt_encoder.interface import EOT_TOKEN, Tokenizer

_FILE_NAME = "char_vocab.json"

_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": EOT_TOKEN,
    "eos_token": EOT_TOKEN,
    "clean_up_tokenization_spaces": False,
}


class CharTokenizer(Tokenizer):
    """A tokenizer whose ids are the positions of characters in sorted order. `<|endoftext|>` has the last id.

    >>> tokenizer = CharTokenizer.from_texts(["hello"])
    >>> tokenizer.encode("hole")
    [1, 3, 2, 0]
    >>> tokenizer.decode([1, 3, 2, 0])
    'hole'
    """

    def __init__(self, characters: Iterable[str]) -> None:
        listed = list(characters)
        wrong = [c for c in listed if not isinstance(c, str) or len(c) != 1 or "\ud800" <= c <= "\udfff"]
        if wrong:
            raise VocabularyError(f"{wrong[0]!r} is not a token: use single Unicode characters other than surrogates")
        self.characters = sorted(set(listed))
        if not self.characters:
            raise VocabularyError("the vocabulary is empty: a CharTokenizer needs a text of at least one character")
        super().__init__({EOT_TOKEN: len(self.characters)})
        self._ids = {character: token_id for token_id, character in enumerate(self.characters)}

    @cached_property
    def token_bytes(self) -> dict[int, bytes]:
        """The UTF-8 bytes of each id."""
        return {token_id: token.encode("utf-8") for token_id, token in enumerate([*self.characters, EOT_TOKEN])}

    @property
    def vocab_size(self) -> int:
        """The number of characters, plus 1 for `<|endoftext|>`."""
        return len(self.characters) + 1

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> CharTokenizer:
        """The tokenizer of all characters in `texts` (an iterable of str, or one str)."""
        characters: set[str] = set()
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise InputTypeError(f"training texts must be str, not {type(text).__name__}: decode bytes first")
            characters.update(text)
        return cls(characters)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> CharTokenizer:
        """The tokenizer in the `char_vocab.json` of a folder. Raises VocabularyError if the file is missing or broken."""
        path = Path(folder) / _FILE_NAME
        try:
            characters = read_json(path)
        except OSError as error:
            raise VocabularyError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            message = pointer_message(path) or f"{path} is not valid JSON ({error}): restore or download the file again"
            raise VocabularyError(message) from None
        if not isinstance(characters, list) or not all(isinstance(character, str) for character in characters):
            raise VocabularyError(f"{path} must contain a list of characters: restore or download the file again")
        return cls(characters)

    @staticmethod
    def is_saved_in(folder: str | os.PathLike[str]) -> bool:
        """Whether `folder` contains the files of a CharTokenizer."""
        return (Path(folder) / _FILE_NAME).is_file()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `char_vocab.json`, the list of characters, and the same for transformers, which gets equal ids from it."""
        with whole_folder(folder) as new:
            atomic_write_json(new / _FILE_NAME, self.characters, indent=None)
            atomic_write_json(new / "tokenizer.json", self._tokenizer_json())
            atomic_write_json(new / "tokenizer_config.json", _TOKENIZER_CONFIG)

    def _tokenizer_json(self) -> dict[str, Any]:
        """The content of a `tokenizer.json`: each character is a word. A character outside the vocabulary is an error."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": self.eot_token_id, "content": EOT_TOKEN, **flags}],
            "normalizer": None,
            # [\s\S] and not a dot, which does not match line ends.
            "pre_tokenizer": {
                "type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},  # without it, blanks would be put between the characters
            # An unknown character is an error if the token for unknown ones is not in the vocabulary.
            "model": {"type": "WordLevel", "vocab": self._ids, "unk_token": ""},
        }  # fmt: skip

    def _encode_ordinary(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
        raise InputError(
            f"the character {character!r} (U+{ord(character):04X}) is not among the {len(self.characters)} characters of "
            "this vocabulary: remove it, or use a byte-level tokenizer, which encodes any text"
        )
