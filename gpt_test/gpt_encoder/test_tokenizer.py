"""GPT2Tokenizer: the same ids and texts as tiktoken for every string; errors; pickling."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import gpt_encoder
from gpt_config import GPT2Error, InputError, InputTypeError
from gpt_encoder import GPT2Tokenizer, train_bpe
from gpt_test.conftest import TRAINING_TEXT

any_text = st.text(st.characters(exclude_categories=[]), max_size=80)  # every code point, including surrogates
mixed_text = st.lists(
    st.sampled_from(
        ["Hello", " world", "don't", "DON'T", "  ", "\n\n", "\t", "\x00", "\x1c", "é", "e\u0301", "中文", "עברית", "हिन्दी",
         "ไทย",
         "🦙", "👩‍👩‍👧‍👦", "🇺🇳", "\ud83e", "\udd99", "<|endoftext|>", "2024", "½", "٣", "!!!", "\u200b", "\ufeff",
         "\U0010ffff"]
    ),
    max_size=12,
).map("".join)  # fmt: skip


@given(any_text | mixed_text | st.text(max_size=200))
@example("\ud83e\udd99")  # a pair of surrogates that encodes a llama
@example("\udd99\ud83e a \ud83e")  # lone surrogates
@example("\ufeffa")
def test_ids_equal_tiktoken(openai_tokenizer: GPT2Tokenizer, tiktoken_gpt2, text: str) -> None:
    assert openai_tokenizer.encode(text) == tiktoken_gpt2.encode(text, disallowed_special=())
    assert openai_tokenizer.encode(text, allowed_special="all") == tiktoken_gpt2.encode(text, allowed_special="all")


def test_every_code_point_equals_tiktoken(openai_tokenizer: GPT2Tokenizer, tiktoken_gpt2) -> None:
    for first in (*range(0, 0x40000, 0x1000), *range(0xE0000, 0x110000, 0x1000)):  # no code points between them are assigned
        text = "".join(f"{chr(point)} {chr(point)}a" for point in range(first, first + 0x1000))
        assert openai_tokenizer.encode(text) == tiktoken_gpt2.encode_ordinary(text), hex(first)


@pytest.mark.parametrize("around", ["{}'s", " {}1", "1{}a"])
def test_every_code_point_in_context_equals_tiktoken(openai_tokenizer: GPT2Tokenizer, tiktoken_gpt2, around: str) -> None:
    """Also those that are assigned in Unicode 17.0 and later: the tables are fixed at tiktoken's version, 16.0."""
    # Without the large blocks of Chinese, Korean and private characters, which are all of one kind.
    spans = ((0x80, 0x3400), (0x9F00, 0xAC00), (0xD7A0, 0xD800), (0xF900, 0x1B300), (0x1BC00, 0x20000), (0x32380, 0x33480))
    points = [point for span in spans for point in range(*span)]
    for some, length in ((points[::16], 200), (points, 20_000)):  # the path of short texts and that of long ones
        for start in range(0, len(some), length):
            text = " .".join(around.replace("{}", chr(point)) for point in some[start : start + length])
            assert openai_tokenizer.encode(text) == tiktoken_gpt2.encode_ordinary(text), hex(some[start])


def characters_of(*spans: tuple[int, int]) -> str:
    return "".join(chr(point) for first, last in spans for point in range(first, last + 1))


LONG_TEXTS = {
    "Chinese": characters_of((0x4E00, 0x9FA5)) + "，。的一是不了" * 900,
    "Japanese": characters_of((0x3041, 0x30FF)) * 20 + characters_of((0x4E00, 0x5E00)) + "のー、。" * 500,
    "Korean": characters_of((0xAC00, 0xD7A3)) + " .,한국" * 800,
    "Arabic": characters_of((0x600, 0x6FF)) + "ال " * 60,
    "Hindi": characters_of((0x900, 0x97F)) + " ।" * 20,
    "Thai": characters_of((0xE01, 0xE5B)) + " " * 9,
    "Russian": characters_of((0x400, 0x45F)) + " .,-" * 9,
    "French": characters_of((0x20, 0x7E), (0xC0, 0xFF)) + " eéà'«»\n" * 40,
    "code": characters_of((0x20, 0x7E)) + "\n\t    self._=()[]'.:" * 9,
    "emoji": characters_of((0x1F300, 0x1F9FF)) + "\u200d\ufe0f 👩a" * 200,
    "bytes as Latin-1": characters_of((0, 0xFF)),
}


@pytest.mark.parametrize("kind", [*LONG_TEXTS, "bytes as UTF-8"])
def test_long_texts_equal_tiktoken(tiktoken_gpt2, kind: str) -> None:
    """The texts are long enough for the arrays. Each is encoded with a new tokenizer, then again with filled caches."""
    generator = random.Random(0)
    if kind == "bytes as UTF-8":
        text = generator.randbytes(120_000).decode("utf-8", errors="replace")
    else:
        words = ["".join(generator.choices(LONG_TEXTS[kind], k=generator.randrange(1, 9))) for _ in range(6000)]
        text = "".join(word + generator.choice(("", " ", " ", "\n", ".\n\n")) for word in generator.choices(words, k=18_000))
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    expected = tiktoken_gpt2.encode_ordinary(text)
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text


@pytest.mark.parametrize("text", ["a", "^", " ", "\n", "ab", " a", "=", "\x00", "字", "🦙", " \n"])
def test_a_million_repeats_take_time_in_proportion(openai_tokenizer: GPT2Tokenizer, text: str) -> None:
    """Eight times the text takes 8 times as long, 64 times with a quadratic loop. Another program may slow one side."""

    def seconds(n: int) -> float:
        long_text = (text * n)[:n]
        began = time.process_time()
        ids = openai_tokenizer.encode(long_text)
        found = time.process_time() - began
        assert openai_tokenizer.decode(ids) == long_text
        return found

    assert any(seconds(1_000_000) < 24 * seconds(125_000) for _ in range(3))


@pytest.mark.parametrize("text", ["a", "^", " ", "\n", "ab", "=", "字", "🦙", " \n"])
def test_long_runs_equal_tiktoken(openai_tokenizer: GPT2Tokenizer, tiktoken_gpt2, text: str) -> None:
    for n in (1, 2, 63, 64, 65, 95, 96, 97, 1000, 5000):
        assert openai_tokenizer.encode(text * n + "x") == tiktoken_gpt2.encode_ordinary(text * n + "x")


@given(any_text | mixed_text)
def test_decode_inverts_encode(openai_tokenizer: GPT2Tokenizer, text: str) -> None:
    without_surrogates = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert openai_tokenizer.decode(openai_tokenizer.encode(text)) == without_surrogates


@given(st.lists(st.integers(0, 50256), max_size=30))
def test_any_ids_decode_as_in_tiktoken(openai_tokenizer: GPT2Tokenizer, tiktoken_gpt2, ids: list[int]) -> None:
    assert openai_tokenizer.decode(ids) == tiktoken_gpt2.decode(ids)
    assert openai_tokenizer.decode_bytes(ids) == tiktoken_gpt2.decode_bytes(ids)


def test_known_ids(openai_tokenizer: GPT2Tokenizer) -> None:
    encode = openai_tokenizer.encode
    assert encode("Hello world") == [15496, 995]
    assert encode(" gazed") == [50255]  # the last merge of the file; without it the ids are [308, 13865]
    assert encode("") == []
    assert openai_tokenizer.vocab_size == 50257
    assert openai_tokenizer.eot_token_id == 50256


def test_shipped_files_are_openais() -> None:
    folder = Path(gpt_encoder.__file__).parent / "openai_gpt2"
    sha256 = {
        "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    }
    for name, expected in sha256.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected


def test_special_tokens_only_when_allowed(openai_tokenizer: GPT2Tokenizer) -> None:
    encode, text = openai_tokenizer.encode, "a<|endoftext|>b"
    assert 50256 not in encode(text)
    assert encode(text, allowed_special="all") == encode(text, allowed_special={"<|endoftext|>"}) == [64, 50256, 65]
    assert encode("<|endoftext|><|endoftext|>", allowed_special="all") == [50256, 50256]
    assert openai_tokenizer.decode([64, 50256, 65]) == text


def test_of_overlapping_special_tokens_the_longest_is_taken(tmp_path: Path) -> None:
    tokenizer = train_bpe([TRAINING_TEXT], 260, special_tokens=["<|a|>", "<|a|>x"])
    assert tokenizer.encode("<|a|>x<|a|>", allowed_special="all") == [259, 258]


def test_return_tensors(openai_tokenizer: GPT2Tokenizer) -> None:
    ids = openai_tokenizer.encode("Hello world", return_tensors="pt")
    assert ids.dtype == torch.int64 and ids.tolist() == [[15496, 995]]
    assert openai_tokenizer.encode("", return_tensors="pt").shape == (1, 0)
    assert openai_tokenizer.decode(ids) == openai_tokenizer.decode(ids[0]) == "Hello world"
    assert openai_tokenizer.decode(iter([15496, 995])) == "Hello world"
    assert openai_tokenizer.decode(15496) == "Hello"


@pytest.mark.parametrize("text", [None, 5, b"bytes", ["a"], 1.5])
def test_encode_accepts_only_str(openai_tokenizer: GPT2Tokenizer, text: object) -> None:
    with pytest.raises(InputTypeError, match=f"not {type(text).__name__}") as caught:
        openai_tokenizer.encode(text)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("ids", [[50257], [-1], [1, 10**20], [0.5], ["a"], [None], [[1], [2]], [[]]])
def test_invalid_ids_are_errors(openai_tokenizer: GPT2Tokenizer, ids: list) -> None:
    if ids == [[]]:
        assert openai_tokenizer.decode(ids) == ""  # a batch of one empty row
        return
    with pytest.raises(InputError):
        openai_tokenizer.decode(ids)


def test_negative_ids_are_errors(openai_tokenizer: GPT2Tokenizer) -> None:
    """Ids are looked up in an array, in which a negative index counts from the end."""
    for wrong in (-1, -50256, -50257, -50258, -100_000, -(2**40)):
        with pytest.raises(InputError, match=rf"token id {wrong} is not"):
            openai_tokenizer.decode([1] * 3000 + [wrong] + [1] * 3000)


def test_ids_may_have_gaps() -> None:
    """Vocabularies of other models skip ids, or have a token with an id far above all others."""
    small = train_bpe([TRAINING_TEXT], 280)
    for far in (5000, 10**9):
        vocabulary = replace(
            small.vocabulary, token_ids={**small.vocabulary.token_ids, "<pad>": far}, special_tokens={"<pad>": far}
        )
        tokenizer = GPT2Tokenizer(vocabulary)
        assert tokenizer.decode([10, far, 11]) == tokenizer.decode([10]) + "<pad>" + tokenizer.decode([11])
        assert tokenizer.encode("a<pad>b", allowed_special="all")[1] == far
        with pytest.raises(InputError, match="token id 4000 is not"):
            tokenizer.decode([4000])


def test_long_texts_need_no_numpy(tmp_path: Path) -> None:
    """NumPy only makes them faster."""
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from gpt_encoder import GPT2Tokenizer\n"
        "tokenizer = GPT2Tokenizer.from_pretrained('gpt2')\n"
        "ids = tokenizer.encode('Hello world' * 5000)\n"
        "print(ids == [15496, 995] + [15496, 995] * 4999 and tokenizer.decode(ids) == 'Hello world' * 5000)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(gpt_encoder.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == "True\n"


def test_a_pickled_tokenizer_does_not_contain_the_caches(openai_tokenizer: GPT2Tokenizer) -> None:
    openai_tokenizer.encode(TRAINING_TEXT)
    pickled = pickle.dumps(openai_tokenizer)
    assert len(pickled) < 4_000_000
    assert pickle.loads(pickled).encode(TRAINING_TEXT) == openai_tokenizer.encode(TRAINING_TEXT)


def test_the_message_names_the_id_and_the_limit(openai_tokenizer: GPT2Tokenizer) -> None:
    with pytest.raises(InputError, match=r"token id 50257 is not in this vocabulary: .* 0 to 50256"):
        openai_tokenizer.decode([1, 50257])


def test_special_tokens_may_come_from_a_generator(openai_tokenizer: GPT2Tokenizer) -> None:
    assert openai_tokenizer.encode("<|endoftext|>", allowed_special=(token for token in ["<|endoftext|>"])) == [50256]


@pytest.mark.parametrize("arguments", [{"allowed_special": "<|endoftext|>"}, {"allowed_special": None},
                                       {"allowed_special": 5}, {"allowed_special": [["a"]]}, {"allowed_special": {"<x>"}},
                                       {"return_tensors": "np"}])  # fmt: skip
def test_wrong_options_are_errors(openai_tokenizer: GPT2Tokenizer, arguments: dict) -> None:
    with pytest.raises(GPT2Error):
        openai_tokenizer.encode("a", **arguments)


def test_decode_accepts_a_list_of_tensor_elements(openai_tokenizer: GPT2Tokenizer) -> None:
    assert openai_tokenizer.decode(list(torch.tensor([15496, 995]))) == "Hello world"
    with pytest.raises(InputError, match="token id 50257"):
        openai_tokenizer.decode(list(torch.tensor([50257])))


def test_a_special_token_spelled_with_surrogates_is_recognized() -> None:
    tokenizer = train_bpe([TRAINING_TEXT], 260, special_tokens=["<🦙>"])
    assert tokenizer.encode("<\ud83e\udd99>", allowed_special="all") == [259]


def test_the_assumptions_of_chunk_cache_about_spaces() -> None:
    """`\\s` of `re` without U+001C to U+001F is `\\s` of `regex`, and the blank is the only printable space."""
    import re

    import regex

    every = "".join(map(chr, range(0x110000)))
    spaces = regex.findall(r"\s", every)
    assert re.findall(r"[^\S\x1c-\x1f]", every) == spaces and " " in spaces
    assert [space for space in spaces if space.isprintable()] == [" "]
