"""Tokenizers of this package and of its peers, each with the subject's vocabulary. It times nothing."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from gpt2.benchmark.results import LeftOutError
from gpt2.benchmark.settings import OURS
from gpt2.benchmark.subject import Subject
from gpt_encoder.tokenizer import GPT2Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Codec:
    """A new tokenizer: ordinary text to ids, and ids to text."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


class CodecAtWork:
    """The tokenizer `name` with its texts, which are not sent to another process while it is timed.

    LeftOutError if the tokenizer cannot take part.
    """

    def __init__(self, name: str, subject: Subject, texts: dict[str, str]) -> None:
        self._make = partial(MAKERS[name], subject)
        self._codec = self._new = self._make()
        self._texts = texts
        self._ids = {text: list[int]() for text in texts}

    def digests(self, text: str) -> tuple[str, str]:
        """The SHA-256 of the ids of a text, and of the text that they decode to. Equal tokenizers have equal digests."""
        ids = self._ids[text] = self._codec.encode(self._texts[text])
        results = array("q", ids).tobytes(), self._codec.decode(ids).encode("utf-8", "surrogatepass")
        first, second = (hashlib.sha256(result).hexdigest() for result in results)
        return first, second

    def renew(self) -> None:
        """Make a new tokenizer for `encode_new`."""
        self._new = self._make()

    def encode_new(self, text: str) -> None:
        """Encode with the tokenizer that `renew` made, which has no cached words yet."""
        self._new.encode(self._texts[text])

    def encode_seen(self, text: str) -> None:
        """Encode with the tokenizer of `digests`, which has already encoded this text."""
        self._codec.encode(self._texts[text])

    def decode(self, text: str) -> None:
        """Decode the ids that `digests` computed."""
        self._codec.decode(self._ids[text])


def _ours(subject: Subject) -> Codec:
    tokenizer = load_tokenizer(subject.folder)
    return Codec(tokenizer.encode, tokenizer.decode)


def _tiktoken(subject: Subject) -> Codec:
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str  # tiktoken's own pattern, not ours

    tokenizer = subject.tokenizer
    if not isinstance(tokenizer, GPT2Tokenizer):
        raise LeftOutError("supports only byte-pair tokenizers")
    special = {**tokenizer.added_tokens, **tokenizer.special_tokens}
    ranks = {token: rank for rank, token in tokenizer.token_bytes.items() if rank not in special.values()}
    encoding = tiktoken.Encoding("subject", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    return Codec(encoding.encode_ordinary, encoding.decode)


def _tokenizers(subject: Subject) -> Codec:
    from tokenizers import Tokenizer

    path = subject.folder / "tokenizer.json"
    if not path.is_file():
        raise LeftOutError("needs tokenizer.json, which the tokenizer of this model does not write")
    tokenizer = Tokenizer.from_file(str(path))
    return Codec(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode)


MAKERS: dict[str, Callable[[Subject], Codec]] = {OURS: _ours, "tiktoken": _tiktoken, "tokenizers": _tokenizers}
