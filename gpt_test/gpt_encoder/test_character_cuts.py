"""Text is cut between two characters only where no token joins them, and its parts have its ids."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_encoder import GPT2Tokenizer, train_bpe
from gpt_encoder.character_cuts import Splitter, cut_pattern, joined_pattern
from gpt_encoder.split_pattern import SPLIT_PATTERN

# Letters and signs of many scripts, some of which GPT-2's tokens join, with what stands between words.
SCRIPTS = "のーティ覚醒龍士的一是不了字ラゴンالمنक्षेत्รไทยбед한국어éüßñÃÂ—–…•─█��¯🦙👩'\u200d\u0301 aZ.,!1\u3000\xa0"
scripts_text = st.text(st.sampled_from(SCRIPTS), max_size=40)


def make_joining_tokenizer() -> GPT2Tokenizer:
    """Its tokens join characters of all scripts, many by a part of their bytes."""
    generator = random.Random(0)
    words = ["".join(generator.choices(SCRIPTS, k=3)) for _ in range(60)]
    return train_bpe(["".join(generator.choices(words, k=4000)), "".join(generator.choices(SCRIPTS, k=10_000))], 1200)


def ready_splitter(tokenizer: GPT2Tokenizer) -> Splitter:
    splitter = Splitter(tokenizer._tokens_beyond_ascii)
    splitter.split("é" * 20_000)
    return splitter


TOKENIZERS = [GPT2Tokenizer.from_pretrained("gpt2"), make_joining_tokenizer()]
SPLITTERS = list(map(ready_splitter, TOKENIZERS))


@given(scripts_text | st.text())
@pytest.mark.parametrize("which", [0, 1])
def test_parts_have_the_ids_of_the_text(which: int, text: str) -> None:
    merge, splitter = TOKENIZERS[which]._merge_piece, SPLITTERS[which]
    pieces = SPLIT_PATTERN.findall(text)
    parts = splitter.split(text)
    assert "".join(parts) == text
    assert [token for part in parts for token in merge(part)] == [token for piece in pieces for token in merge(piece)]
    for piece in pieces:
        cut = splitter.cut(piece)
        assert "".join(cut) == piece
        assert [token for part in cut for token in merge(part)] == merge(piece)


def test_a_token_is_never_cut(openai_tokenizer: GPT2Tokenizer) -> None:
    """Nor a token that begins or ends inside a character, whatever the character."""
    generator = random.Random(0)
    wide = [chr(point) for point in range(0x80, 0x10000) if not 0xD800 <= point < 0xE000]
    encoded = [character.encode() for character in wide]
    cut = cut_pattern(joined_pattern(openai_tokenizer._tokens_beyond_ascii())).findall
    n_checked = 0
    for token in openai_tokenizer._tokens_beyond_ascii():
        head = token[: next((at for at, byte in enumerate(token) if byte & 0xC0 != 0x80), len(token))]
        tail_at = max(at for at, byte in enumerate(token) if byte & 0xC0 != 0x80) if len(head) < len(token) else len(token)
        tail = token[tail_at:]
        fronts = [c for c in encoded if c.endswith(head)] if head else [head]
        ends = [c for c in encoded if c.startswith(tail)] if tail else [tail]
        for _ in range(3 if fronts and ends else 0):
            whole = generator.choice(fronts) + token[len(head) : tail_at] + generator.choice(ends)
            try:
                text = whole.decode()
            except UnicodeDecodeError:
                continue
            n_checked += 1
            assert cut(text) == [text], token
    assert n_checked > 1000


def test_scripts_that_the_tokens_do_not_join_come_apart() -> None:
    """Without this, a mistake could turn the cuts off and every other test would still pass."""
    assert SPLITTERS[0].split("我们不知道") == ["我", "们", "不", "知", "道"]
    assert SPLITTERS[0].cut(" привет") == [" п", "р", "и", "в", "е", "т"]


def test_little_text_beyond_ascii_waits_for_no_pattern(openai_tokenizer: GPT2Tokenizer) -> None:
    splitter = Splitter(lambda: pytest.fail("the patterns were made"))
    assert splitter.split("naïve café ไทย") == ["naïve", " café", " ไทย"]
    assert splitter.cut("ไทย") == ["ไทย"]
