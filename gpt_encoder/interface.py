"""Tokenizer: the interface of all tokenizers. It knows special tokens and bytes, not how text is split into tokens."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, overload

from gpt_config.cores import process_limit
from gpt_config.errors import InputError, InputTypeError
from gpt_config.validation import check_whole
from gpt_encoder.added_tokens import AddedToken, split_at_tokens

if TYPE_CHECKING:
    import torch

    from gpt_encoder.arrays.decoder import ArrayDecoder
    from gpt_encoder.batch_encoding import BatchSettings

EOT_TOKEN = "<|endoftext|>"

# From this number of ids on, decoding with arrays is faster, including the time to build its tables.
_WORTH_ARRAYS = 4096


def mend_surrogates(text: str) -> str:
    """`text` without surrogates: a pair becomes the character that it encodes, a lone one U+FFFD, as in tiktoken."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


class Tokenizer(ABC):
    """Converts text to token ids and ids to text.

    `special_tokens` maps the text of each special token to its id. Text becomes a special token only if `allowed_special`
    names it. `added_tokens` maps the text of each ordinary added token to its id; text always becomes such a token.

    `roles` maps the names of transformers' roles (bos_token, eos_token, pad_token, unk_token and others) to the texts of
    tokens. `first_ids` and `last_ids` are the ids that `encode` adds before and after each text; most tokenizers have none.

    `end_token_id` is the end token of the model that the tokenizer is used with, if it is known; None: that of the files.
    """

    end_token_id: int | None = None

    def __init__(
        self,
        special_tokens: Mapping[str, int],
        added_tokens: Iterable[AddedToken] = (),
        *,
        roles: Mapping[str, str] | None = None,
        first_ids: Sequence[int] = (),
        last_ids: Sequence[int] = (),
    ) -> None:
        """`added_tokens`: the ordinary added tokens, and the special ones that are found by more than their text."""
        added = list(added_tokens)
        self.special_tokens = dict(special_tokens)
        self.added_tokens = {token.text: token.token_id for token in added if not token.is_special}
        self.roles = dict(roles or {})
        self.first_ids, self.last_ids = list(first_ids), list(last_ids)
        self._matched_tokens = {text: AddedToken(text, token_id) for text, token_id in self.special_tokens.items()}
        self._matched_tokens |= {token.text: token for token in added}

    @property
    @abstractmethod
    def token_bytes(self) -> Mapping[int, bytes]:
        """The bytes of each id."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The largest id plus 1: the number of rows that a model's embedding needs."""

    @abstractmethod
    def _encode_ordinary(self, text: str) -> list[int]:
        """The ids of `text` as ordinary text: no special token is recognized."""

    @abstractmethod
    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the files from which `load_tokenizer(folder)` loads an equal tokenizer. Raises WriteError."""

    def with_special_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """A tokenizer that also has `tokens` as special tokens, with new ids after the last one. This one does not change.

        Tokens that are already special keep their ids. Raises InputError for a text that is another token, and for a
        vocabulary that has a fixed set of special tokens.
        """
        if all(token in self.special_tokens for token in tokens):
            return self
        raise InputError(
            f"the special token {tokens[0]!r} cannot be added to a vocabulary of characters: use a byte-level vocabulary"
        )

    @property
    def eot_token_id(self) -> int | None:
        """The id of the token that ends a text. None if there is none.

        It is `end_token_id`, which the model has decided, or else `eos_token_id`, or else the id of `<|endoftext|>`.
        """
        if self.end_token_id is not None:
            return self.end_token_id
        return self.special_tokens.get(EOT_TOKEN) if self.eos_token_id is None else self.eos_token_id

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token with the role bos_token, which begins a text. None if there is none."""
        return self._id_of_role("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token with the role eos_token, which ends a text. None if there is none."""
        return self._id_of_role("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id of the token with the role pad_token, which fills the shorter rows of a batch. None if there is none."""
        return self._id_of_role("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """The id of the token with the role unk_token. `encode` never returns it for a text. None if there is none."""
        return self._id_of_role("unk_token")

    def _id_of_role(self, role: str) -> int | None:
        return self.special_tokens.get(self.roles.get(role, ""))

    @overload
    def encode(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | Collection[str] = (),
        add_special_tokens: bool = True,
        return_tensors: None = None,
    ) -> list[int]: ...

    @overload
    def encode(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | Collection[str] = (),
        add_special_tokens: bool = True,
        return_tensors: Literal["pt"],
    ) -> torch.Tensor: ...

    def encode(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | Collection[str] = (),
        add_special_tokens: bool = True,
        return_tensors: Literal["pt"] | None = None,
    ) -> list[int] | torch.Tensor:
        """The token ids of `text` as a list.

        The text of a special token is ordinary text unless `allowed_special` names it ("all", or a collection of texts of
        special tokens). If the tokenizer's files say that each text begins with a bos token, the ids begin with it, as in
        transformers; with `add_special_tokens=False` they do not. GPT-2's own tokenizer adds no token. With
        `return_tensors="pt"` the result is an int64 tensor of shape (1, T).

        Raises InputTypeError if `text` is not a str or `allowed_special` has the wrong type, and InputError for an unknown
        special token, an unknown `return_tensors`, or a text that the vocabulary cannot encode.

        >>> from gpt_encoder import GPT2Tokenizer
        >>> tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
        >>> tokenizer.encode("Hello world<|endoftext|>", allowed_special="all")
        [15496, 995, 50256]
        """
        parts = self.special_parts(text, self._allowed_ids(allowed_special))
        rows = ([part] if isinstance(part, int) else self._encode_ordinary(part) for part in parts)
        ids = next(rows) if len(parts) == 1 else list(chain.from_iterable(rows))
        if add_special_tokens:
            ids = self._with_ends(ids)
        if return_tensors is None:
            return ids
        if return_tensors != "pt":
            raise InputError(f"return_tensors={return_tensors!r} is not supported: use 'pt', or omit it for a list")
        import torch  # here, because only this case needs it

        return torch.tensor([ids], dtype=torch.int64)

    def _with_ends(self, ids: list[int]) -> list[int]:
        return [*self.first_ids, *ids, *self.last_ids] if self.first_ids or self.last_ids else ids

    def _allowed_ids(self, allowed_special: Literal["all"] | Collection[str]) -> dict[str, int]:
        """The ids of all tokens to be found in a text, by their texts."""
        if allowed_special == "all":
            return {**self.special_tokens, **self.added_tokens} if self.added_tokens else self.special_tokens
        if isinstance(allowed_special, str) or not isinstance(allowed_special, Iterable):
            raise InputTypeError(f"allowed_special={allowed_special!r} must be 'all' or a collection of special tokens")
        allowed = dict(self.added_tokens)
        for token in allowed_special:
            if isinstance(token, str) and token in self.added_tokens:
                continue
            if not isinstance(token, str) or token not in self.special_tokens:
                known = ", ".join(self.special_tokens) or "none"
                raise InputError(f"allowed_special names {token!r}: the special tokens of this vocabulary are {known}")
            allowed[token] = self.special_tokens[token]
        return allowed

    def special_parts(self, text: str, allowed: Mapping[str, int]) -> list[str | int]:
        """`text` split at the special tokens in `allowed`, which are replaced by their ids.

        Raises InputTypeError if `text` is not a str.
        """
        if not isinstance(text, str):
            raise InputTypeError(f"text to encode must be a str, not {type(text).__name__}: decode bytes first")
        if allowed and not text.isascii():
            text = mend_surrogates(text)  # first, because a special token may be spelled with surrogates
        if not allowed or not any(token in text for token in allowed):
            return [text]
        return split_at_tokens(text, map(self._matched_tokens.__getitem__, allowed))

    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        allowed_special: Literal["all"] | Collection[str] = (),
        add_special_tokens: bool = True,
        n_workers: int | None = None,
        settings: BatchSettings | None = None,
    ) -> list[list[int]]:
        """The token ids of each text, as from `encode`, computed by `n_workers` processes (default: one per core).

        Less than a few megabytes of text, in fewer than about ten thousand texts, are encoded by this process alone. With
        several processes, all texts are in memory at once. Processes are forked on Linux only. On other systems a script
        that calls this method needs `if __name__ == "__main__":`.

        `settings` (`gpt_encoder.batch_encoding.BatchSettings`) says how texts are divided among the processes; the defaults
        are measured.

        Raises InputTypeError if `texts` is not an iterable of str, ConfigError for an invalid `n_workers`, and InputError if
        a worker is killed.

        >>> from gpt_encoder import GPT2Tokenizer
        >>> tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
        >>> tokenizer.encode_batch(["Hello world", "Hello"])
        [[15496, 995], [15496]]
        """
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
            raise InputTypeError(f"texts to encode must be an iterable of str, not {type(texts).__name__}")
        if n_workers is not None:
            check_whole("n_workers", n_workers, 1)
        from gpt_encoder.batch_encoding import encode_in_processes  # here, because few programs need it

        allowed = self._allowed_ids(allowed_special)
        rows = encode_in_processes(self, texts, allowed, n_workers or process_limit().count, settings)
        return list(map(self._with_ends, rows)) if add_special_tokens and (self.first_ids or self.last_ids) else rows

    def encode_each_packed(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as the bytes of an array of 32-bit unsigned ints. No special token is recognized or added."""
        if not self.added_tokens:
            return self._encode_each_ordinary(texts)
        split = [self.special_parts(text, self.added_tokens) for text in texts]
        packed = iter(self._encode_each_ordinary([part for parts in split for part in parts if isinstance(part, str)]))
        return [
            b"".join(array("I", [part]).tobytes() if isinstance(part, int) else next(packed) for part in parts)
            for parts in split
        ]

    def _encode_each_ordinary(self, texts: Sequence[str]) -> list[bytes]:
        """As `encode_each_packed`, without added tokens."""
        return [array("I", self._encode_ordinary(text)).tobytes() for text in texts]

    def unpack_each(self, packed: bytes | memoryview, counts: Sequence[int]) -> list[list[int]]:
        """The ids of each text as a list. `packed`: the ids of all texts, packed; `counts`: the number of ids per text."""
        ids = memoryview(packed).cast("I")
        return [ids[begin:end].tolist() for begin, end in pairwise(accumulate(counts, initial=0))]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, joined.

        Raises InputError for an id outside the vocabulary and for a batch of several rows, and InputTypeError if `ids` has
        the wrong type.
        """
        ids = _as_list(ids)
        decoder = self._array_decoder if len(ids) >= _WORTH_ARRAYS else None
        if decoder and (data := decoder.decode(ids)) is not None:
            return data
        try:
            # One call of itemgetter with many ids is faster than many calls. For a single id it returns a string instead of
            # a tuple, which "".join leaves unchanged.
            return "".join(itemgetter(*ids)(self._latin_1_of_token)).encode("latin-1")
        except (KeyError, TypeError):  # an unknown id, an id of another type, or no ids
            return b"".join(map(self._bytes_of_token, ids))

    @cached_property
    def _array_decoder(self) -> ArrayDecoder | None:
        try:
            from gpt_encoder.arrays.decoder import ArrayDecoder
        except ImportError:  # NumPy is optional: it only makes decoding faster
            return None
        return ArrayDecoder(self.token_bytes)

    @cached_property
    def _latin_1_of_token(self) -> dict[int, str]:
        """`token_bytes` as strings with one character per byte, because str.join is twice as fast as bytes.join."""
        return {token_id: token.decode("latin-1") for token_id, token in self.token_bytes.items()}

    def _bytes_of_token(self, token_id: Any) -> bytes:
        if hasattr(token_id, "item"):  # an element of a tensor or array
            token_id = token_id.item()
        if _is_key(token_id, self.token_bytes):
            return self.token_bytes[token_id]
        raise InputError(
            f"token id {token_id!r} is not in this vocabulary: ids are whole numbers from 0 to {self.vocab_size - 1}"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` (a list, a 1-D tensor, or any iterable). Bytes that are not UTF-8 become U+FFFD.

        Raises InputError for an id outside the vocabulary and for a batch of several rows, and InputTypeError if `ids` has
        the wrong type.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def _as_list(ids: Any) -> list[int]:
    """`ids` as a flat list. A 2-D tensor or array is accepted if it has one row."""
    if isinstance(ids, int):
        return [ids]
    if isinstance(ids, (str, bytes)) or not (hasattr(ids, "tolist") or isinstance(ids, Iterable)):
        raise InputTypeError(f"ids to decode must be a list or tensor of ints, not {type(ids).__name__}")
    values = ids if type(ids) is list else ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not isinstance(values, list):
        return [values]
    if len(values) == 1 and isinstance(values[0], list):
        return values[0]
    if values and isinstance(values[0], list):
        raise InputError(f"ids to decode are a batch of {len(values)} rows: decode one row at a time")
    return values


def _is_key(token: object, table: Mapping[int, bytes]) -> bool:
    try:
        return token in table
    except TypeError:  # unhashable
        return False
