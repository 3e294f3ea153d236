"""Tokens as the API shows them: text, bytes, and arrays of log-probabilities. It knows tokenizers, not models."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from gpt2.serving.prompt_pass import Top
from gpt_encoder.interface import Tokenizer

# JSON has no infinity: the logarithm of a probability of 0 is this.
LEAST = -9999.0


class TokenTexts:
    r"""The texts of a tokenizer's tokens. One that is not whole UTF-8 is `bytes:\x..`, so that no two share a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=65536)(self._of)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token."""
        return self._tokenizer.decode_bytes([token])

    def _of(self, token: int) -> str:
        data = self.bytes_of(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionArrays:
    """The `logprobs` of a completion, in one piece or several, which continue each other."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def add(self, ids: Sequence[int], logprobs: Sequence[float | None], top: Sequence[Top]) -> dict[str, Any]:
        """Return the arrays of the next tokens. `text_offset` counts characters of the complete text."""
        offsets = []
        for token in ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._texts.bytes_of(token)))
        return {
            "tokens": [self._texts.of(token) for token in ids],
            "token_logprobs": [None if logprob is None else clamped(logprob) for logprob in logprobs],
            "top_logprobs": [
                None if logprob is None else self._best(token, logprob, best)
                for token, logprob, best in zip(ids, logprobs, top, strict=True)
            ],
            "text_offset": offsets,
        }

    def _best(self, token: int, logprob: float, best: Top) -> dict[str, float]:
        """The alternatives by their text, and the token itself, whose number is the same as in `token_logprobs`."""
        found: dict[str, float] = {}
        for other, number in best:
            found.setdefault(self._texts.of(other), clamped(number))
        found[self._texts.of(token)] = clamped(logprob)
        return found


def chat_logprobs(texts: TokenTexts, ids: Sequence[int], logprobs: Sequence[float], top: Sequence[Top]) -> dict[str, Any]:
    """Return the `logprobs` of a chat completion, or of a chunk of it."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts.of(token), "logprob": clamped(logprob), "bytes": list(texts.bytes_of(token))}

    content = [
        {**entry(token, logprob), "top_logprobs": [entry(*other) for other in best]}
        for token, logprob, best in zip(ids, logprobs, top, strict=True)
    ]
    return {"content": content, "refusal": None}


def clamped(logprob: float) -> float:
    """A logarithm that JSON can write."""
    return max(logprob, LEAST)
