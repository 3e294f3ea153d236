"""GPT2Tokenizer: GPT-2's byte-level BPE. It knows the split pattern and chooses the encoder for a text.

It knows neither the file formats (`vocab_files`) nor the merge algorithms (`byte_pair`, `arrays/`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import regex

from gpt_config.collector import collector_paused
from gpt_config.errors import InputError
from gpt_config.locate import TOKENIZER_FILES, locate, published_name
from gpt_config.unfinished import check_finished
from gpt_config.whole_folder import whole_folder
from gpt_encoder.byte_pair import BytePairMerger
from gpt_encoder.char_tokenizer import CharTokenizer
from gpt_encoder.chunk_cache import ChunkCache
from gpt_encoder.interface import Tokenizer, mend_surrogates
from gpt_encoder.unicode_tables import kind_of_each_character
from gpt_encoder.vocab_files import (
    CHARACTER_OF_BYTE,
    Vocabulary,
    byte_token_ids,
    bytes_by_id,
    read_vocab_and_merges,
    read_vocabulary,
    tokens_beyond_ascii,
    write_vocabulary,
)

if TYPE_CHECKING:
    from gpt_encoder.arrays.encoder import ArrayEncoder

# The pattern that splits text into pieces, from OpenAI's `encoder.py`. Merges happen only within a piece. Only lower-case
# contractions match; a correction of that would change the ids. It is applied to ASCII only (`split_pieces`), so the Unicode
# version of the installed `regex` does not matter.
SPLIT_PATTERN = regex.compile(r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")

# From this number of characters on, encoding with arrays is faster. The first such text must also repay their tables.
_WORTH_TABLES = 1 << 15
# The same limit once the tables exist.
_WORTH_ARRAYS = 1 << 12

_SHIPPED_FOLDER = Path(__file__).parent / "openai_gpt2"


def split_pieces(text: str) -> list[str]:
    """The pieces into which GPT-2's pattern splits `text`, with the letters, numbers and spaces of Unicode 16.0."""
    if text.isascii():
        return SPLIT_PATTERN.findall(text)
    ends = (match.end() for match in SPLIT_PATTERN.finditer(text.translate(kind_of_each_character())))
    return [text[begin:end] for begin, end in pairwise(chain((0,), ends))]


class GPT2Tokenizer(Tokenizer):
    """The tokenizer of GPT-2, and of models with the same algorithm and another vocabulary.

    `vocabulary`: its tokens and merges. `merger`: the merges as a function of ids. Neither may be changed.

    >>> tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    >>> tokenizer.encode("Hello world")
    [15496, 995]
    >>> tokenizer.decode([15496, 995])
    'Hello world'
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        token_ids = vocabulary.token_ids
        super().__init__(
            vocabulary.special_tokens,
            vocabulary.added_tokens,
            roles=vocabulary.role_tokens,
            first_ids=vocabulary.first_ids,
            last_ids=vocabulary.last_ids,
        )
        self.vocabulary = vocabulary
        # The bytes that have a token. Some vocabularies have only those of the text that they were learned from.
        self._known_bytes = bytes(byte for byte, character in CHARACTER_OF_BYTE.items() if character in token_ids)
        self._byte_ids = byte_token_ids(token_ids)
        ranks = {(token_ids[left], token_ids[right]): rank for rank, (left, right) in enumerate(vocabulary.merges)}
        self.merger = BytePairMerger(ranks, [token_ids[left + right] for left, right in vocabulary.merges])
        self._chunks = ChunkCache(self.split, self.merge_piece)

    @classmethod
    @collector_paused()
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str] = "gpt2") -> GPT2Tokenizer:
        """The tokenizer of a published GPT-2 (its files ship with this package), of a folder, or of a hub repository.

        Raises VocabularyError if the files are missing, broken or not GPT-2's, and ModelNotFoundError for an unknown name.
        """
        return cls(read_vocabulary(_locate_tokenizer(name_or_folder)))

    @classmethod
    def from_files(cls, vocab: str | os.PathLike[str], merges: str | os.PathLike[str]) -> GPT2Tokenizer:
        """The tokenizer in two files of any name: the tokens as in vocab.json, and the merges as in merges.txt.

        Raises VocabularyError if a file is missing or broken, or if the two do not belong together.
        """
        return cls(read_vocab_and_merges(Path(vocab), Path(merges)))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write vocab.json, merges.txt, tokenizer.json and tokenizer_config.json. transformers loads them as well.

        Raises WriteError if a file cannot be written.
        """
        with whole_folder(folder) as new:
            write_vocabulary(new, self.vocabulary)

    def with_special_tokens(self, tokens: Sequence[str]) -> GPT2Tokenizer:
        """As in Tokenizer.

        >>> GPT2Tokenizer.from_pretrained("gpt2").with_special_tokens(["<|user|>"]).special_tokens
        {'<|endoftext|>': 50256, '<|user|>': 50257}
        """
        new = [token for token in dict.fromkeys(tokens) if token not in self.special_tokens]
        for token in new:
            if token in self.added_tokens or token in self.vocabulary.token_ids:
                raise InputError(f"{token!r} is already an ordinary token of this vocabulary: choose another text")
        vocabulary = replace(
            self.vocabulary,
            special_tokens={**self.special_tokens, **{text: self.vocab_size + n for n, text in enumerate(new)}},
            extra_special_tokens=(*self.vocabulary.extra_special_tokens, *new),
        )
        made = type(self)(vocabulary)
        made.end_token_id = self.end_token_id
        return made

    @cached_property
    def token_bytes(self) -> dict[int, bytes]:
        """The bytes of each id."""
        return bytes_by_id(self.vocabulary.token_ids, {**self.added_tokens, **self.special_tokens})

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus 1: the number of rows that a model's embedding needs."""
        ids = (self.vocabulary.token_ids, self.special_tokens, self.added_tokens)
        return 1 + max(chain.from_iterable(tokens.values() for tokens in ids))

    def split(self, text: str) -> list[str]:
        """The pieces of `text`, which join to `text`. Merges happen only within a piece."""
        return split_pieces(text)

    def merge_piece(self, piece: str) -> tuple[int, ...]:
        """The ids of one piece from `split`."""
        return tuple(self.merger.merge([self._byte_ids[byte] for byte in piece.encode("utf-8")]))

    def _check_bytes(self, text: str) -> None:
        """Raise InputError if the vocabulary has no token for one of the text's bytes."""
        if len(self._known_bytes) == 256:
            return
        unknown = mend_surrogates(text).encode("utf-8").translate(None, self._known_bytes)
        if unknown:
            byte = unknown[0]
            character = next(c for c in mend_surrogates(text) if byte in c.encode("utf-8"))
            raise InputError(
                f"the vocabulary has tokens for {len(self._known_bytes)} of the 256 bytes, but none for {byte:#04x} in "
                f"{character!r}: remove the character, or use a tokenizer with all of them"
            )

    def _encode_ordinary(self, text: str) -> list[int]:
        self._check_bytes(text)
        try:
            if encoder := self._encoder_for(len(text)):
                return encoder.encode(text)
            return self._chunks.encode(text)
        except UnicodeEncodeError:
            return self._encode_ordinary(mend_surrogates(text))

    def _encode_each_ordinary(self, texts: Sequence[str]) -> list[bytes]:
        """As in Tokenizer. Arrays are used if all texts together are long enough."""
        for text in texts:
            self._check_bytes(text)
        encoder = self._encoder_for(sum(map(len, texts)))
        if encoder is None:
            return super()._encode_each_ordinary(texts)
        try:
            return encoder.encode_each_packed(texts)
        except UnicodeEncodeError:
            return self._encode_each_ordinary([text if text.isascii() else mend_surrogates(text) for text in texts])

    def unpack_each(self, packed: bytes | memoryview, counts: Sequence[int]) -> list[list[int]]:
        """As in Tokenizer."""
        encoder = self._encoder_for(sum(counts))
        return encoder.unpack_each(packed, counts) if encoder else super().unpack_each(packed, counts)

    def _encoder_for(self, n_characters: int) -> ArrayEncoder | None:
        worth = _WORTH_ARRAYS if "_array_encoder" in vars(self) else _WORTH_TABLES
        return self._array_encoder if n_characters >= worth else None

    @cached_property
    def _array_encoder(self) -> ArrayEncoder | None:
        try:
            from gpt_encoder.arrays.encoder import ArrayEncoder
        except ImportError:  # NumPy is optional: it only makes encoding faster
            return None
        tokens = partial(tokens_beyond_ascii, self.vocabulary.token_ids)
        return ArrayEncoder.of(self.merger, self._byte_ids, tokens)

    def __reduce__(self) -> tuple[type[GPT2Tokenizer], tuple[Vocabulary]]:
        """Pickle only the vocabulary, not the caches."""
        return type(self), (self.vocabulary,)


def load_tokenizer(name_or_folder: str | os.PathLike[str] = "gpt2") -> Tokenizer:
    """The tokenizer of a published GPT-2, a folder or a hub repository: a CharTokenizer or a GPT2Tokenizer.

    Raises VocabularyError if the files are missing, broken or not GPT-2's, and ModelNotFoundError for an unknown name.
    """
    folder = _locate_tokenizer(name_or_folder)
    kind = CharTokenizer if CharTokenizer.is_saved_in(folder) else GPT2Tokenizer
    return kind.from_pretrained(folder)


def _locate_tokenizer(name_or_folder: str | os.PathLike[str]) -> Path:
    if isinstance(name_or_folder, (str, os.PathLike)) and published_name(str(name_or_folder)):
        folder = Path(name_or_folder)
        check_finished(folder)
        return folder if has_tokenizer(folder) else _SHIPPED_FOLDER
    return locate(name_or_folder, files=[TOKENIZER_FILES], complete=has_tokenizer)


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` contains tokenizer files that `load_tokenizer` can read."""
    sets = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
    return CharTokenizer.is_saved_in(folder) or any(all((folder / name).is_file() for name in names) for names in sets)
