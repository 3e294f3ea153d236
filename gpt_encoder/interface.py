"""Tokenizer: the interface of all tokenizers. It knows special tokens and bytes, not how text is split into tokens."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import regex

from gpt_config.cores import process_limit
from gpt_config.errors import InputError, InputTypeError, WriteError
from gpt_config.locate import TOKENIZER_FILES
from gpt_config.validation import check_whole

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
    names it.
    """

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self.special_tokens = dict(special_tokens)

    @staticmethod
    def _remove_other_files(folder: Path, written: Collection[str]) -> None:
        """Remove the other tokenizer files of `folder`: files of another tokenizer would give wrong ids."""
        for name in TOKENIZER_FILES:
            if name not in written:
                try:
                    (folder / name).unlink(missing_ok=True)
                except OSError as error:
                    raise WriteError(
                        f"cannot remove {folder / name}, a file of another tokenizer ({error.strerror}): remove it yourself"
                    ) from None

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

    @property
    def eot_token_id(self) -> int | None:
        """The id of `<|endoftext|>`, or None if the vocabulary does not have it."""
        return self.special_tokens.get(EOT_TOKEN)

    @overload
    def encode(
        self, text: str, *, allowed_special: Literal["all"] | Collection[str] = (), return_tensors: None = None
    ) -> list[int]: ...

    @overload
    def encode(
        self, text: str, *, allowed_special: Literal["all"] | Collection[str] = (), return_tensors: Literal["pt"]
    ) -> torch.Tensor: ...

    def encode(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | Collection[str] = (),
        return_tensors: Literal["pt"] | None = None,
    ) -> list[int] | torch.Tensor:
        """The token ids of `text` as a list; no token is added at the start or end.

        The text of a special token is ordinary text unless `allowed_special` names it ("all", or a collection of texts of
        special tokens). With `return_tensors="pt"` the result is an int64 tensor of shape (1, T).

        Raises InputTypeError if `text` is not a str or `allowed_special` has the wrong type, and InputError for an unknown
        special token or an unknown `return_tensors`.

        >>> from gpt_encoder import GPT2Tokenizer
        >>> tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
        >>> tokenizer.encode("Hello world<|endoftext|>", allowed_special="all")
        [15496, 995, 50256]
        """
        parts = self.special_parts(text, self._allowed_ids(allowed_special))
        rows = ([part] if isinstance(part, int) else self._encode_ordinary(part) for part in parts)
        ids = next(rows) if len(parts) == 1 else list(chain.from_iterable(rows))
        if return_tensors is None:
            return ids
        if return_tensors != "pt":
            raise InputError(f"return_tensors={return_tensors!r} is not supported: use 'pt', or omit it for a list")
        import torch  # here, because only this case needs it

        return torch.tensor([ids], dtype=torch.int64)

    def _allowed_ids(self, allowed_special: Literal["all"] | Collection[str]) -> dict[str, int]:
        if allowed_special == "all":
            return self.special_tokens
        if isinstance(allowed_special, str) or not isinstance(allowed_special, Iterable):
            raise InputTypeError(f"allowed_special={allowed_special!r} must be 'all' or a collection of special tokens")
        allowed = {}
        for token in allowed_special:
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
        longest_first = sorted(allowed, key=len, reverse=True)
        parts = regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text)
        return [allowed.get(part, part) for part in parts if part]

    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        allowed_special: Literal["all"] | Collection[str] = (),
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
        return encode_in_processes(self, texts, allowed, n_workers or process_limit().count, settings)

    def encode_each_packed(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as the bytes of an array of 32-bit unsigned ints. No special token is recognized."""
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
