"""The tokenizer checks pass, and they fail if encoding or decoding is broken."""

from __future__ import annotations

import pytest

from gpt2.verification.checks import Status
from gpt2.verification.tokenizers import tokenizer_checks
from gpt_encoder import CharTokenizer, GPT2Tokenizer

pytest.importorskip("tiktoken", reason="tiktoken is not installed (pip install '.[test]')")


def statuses(tokenizer: GPT2Tokenizer) -> dict[str, Status]:
    return {check.part: check.run().status for check in tokenizer_checks(tokenizer)}


def test_openais_and_a_learned_vocabulary_pass(openai_tokenizer: GPT2Tokenizer, small_tokenizer: GPT2Tokenizer) -> None:
    for tokenizer in (openai_tokenizer, small_tokenizer):
        assert statuses(tokenizer) == {"ids of texts": Status.PASS, "texts of ids": Status.PASS}


@pytest.mark.parametrize(("method", "part"), [("encode", "ids of texts"), ("decode", "texts of ids")])
def test_a_broken_tokenizer_fails(small_tokenizer: GPT2Tokenizer, method: str, part: str) -> None:
    whole = getattr(GPT2Tokenizer, method)
    broken = type("Broken", (GPT2Tokenizer,), {method: lambda self, given: whole(self, given)[::-1]})
    found = statuses(broken(small_tokenizer.vocabulary))
    assert found.pop(part) == Status.FAIL and set(found.values()) == {Status.PASS}


def test_another_kind_of_tokenizer_has_no_checks() -> None:
    assert list(tokenizer_checks(CharTokenizer("ab"))) == []
