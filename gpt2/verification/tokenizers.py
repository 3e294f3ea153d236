"""The tokenizer against tiktoken with the same vocabulary and tiktoken's own pattern. It knows no models."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from gpt2.verification.checks import EXACT, Check, Pair
from gpt_encoder.interface import Tokenizer
from gpt_encoder.tokenizer import GPT2Tokenizer

_N_RANDOM = 300  # random texts, and random lists of ids
# Contractions, all kinds of whitespace, numbers, scripts, emoji with joiners, and the spelling of a special token.
_TEXTS = (
    "", " ", "Hello world", "don't we'll I'm THEY'RE", "  two  blanks\tand\ttabs \n\n lines\r\n", "3.14159 1,000,000 ½ ²",
    "naïve café Ångström", "Привет, мир! こんにちは世界 안녕 مرحبا नमस्ते", "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\ufeff",
    "x = [i**2 for i in range(10)]  # ok",
    "<|endoftext|>", "\x00\x7f\x80\xff", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "'''quotes''' \"and\" …",
)  # fmt: skip
# Ranges of code points for random texts.
_RANGES = ((32, 126), (0, 255), (0x400, 0x4FF), (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF), (0, 0xD7FF))


def tokenizer_checks(tokenizer: Tokenizer) -> Iterator[Check]:
    """Checks of encoding and decoding; none if the tokenizer is of another kind or tiktoken is not installed."""
    if isinstance(tokenizer, GPT2Tokenizer) and importlib.util.find_spec("tiktoken"):
        yield Check("ids of texts", "tokenizer", "tiktoken", "integers", EXACT, partial(_ids, tokenizer))
        yield Check("texts of ids", "tokenizer", "tiktoken", "bytes", EXACT, partial(_texts, tokenizer))


def _tiktoken(tokenizer: GPT2Tokenizer) -> Any:
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    special = {**tokenizer.added_tokens, **tokenizer.special_tokens}
    ranks = {token: rank for rank, token in tokenizer.token_bytes.items() if rank not in special.values()}
    return tiktoken.Encoding("checked", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def _ids(tokenizer: GPT2Tokenizer) -> Iterator[Pair]:
    theirs, rng = _tiktoken(tokenizer), random.Random(0)
    for text in (*_TEXTS, *(_random_text(rng) for _ in range(_N_RANDOM))):
        # The length comes first, because an empty text has no ids, and a comparison without numbers is an error.
        found, expected = tokenizer.encode(text, add_special_tokens=False), theirs.encode_ordinary(text)
        yield repr(text[:20]), [len(found), *found], [len(expected), *expected]


def _texts(tokenizer: GPT2Tokenizer) -> Iterator[Pair]:
    theirs, rng = _tiktoken(tokenizer), random.Random(1)
    for _ in range(_N_RANDOM):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 12))]
        found, expected = tokenizer.decode(ids), theirs.decode(ids)
        yield str(ids), list(found.encode()), list(expected.encode())


def _random_text(rng: random.Random) -> str:
    return "".join(chr(rng.randint(*rng.choice(_RANGES))) for _ in range(rng.randrange(40)))
