"""Vocabulary files: every format gives the same tokenizer; broken files and other tokenizers' files are errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import gpt_encoder
from gpt_config import GPT2Error, ModelNotFoundError, VocabularyError
from gpt_encoder import CharTokenizer, GPT2Tokenizer, load_tokenizer
from gpt_encoder.vocab_files import CHARACTER_OF_BYTE, Vocabulary
from gpt_test.conftest import TRAINING_TEXT

SAMPLES = [TRAINING_TEXT, "naïve 🦙\n\n  x", "a<|endoftext|>b", "\x00\x1c"]
SHIPPED = Path(gpt_encoder.__file__).parent / "openai_gpt2"


def assert_equal_ids(a: GPT2Tokenizer, b: GPT2Tokenizer) -> None:
    assert a.special_tokens == b.special_tokens and a.vocab_size == b.vocab_size
    for text in SAMPLES:
        assert a.encode(text) == b.encode(text)
        assert a.encode(text, allowed_special="all") == b.encode(text, allowed_special="all")


@pytest.mark.parametrize(
    "kept", [("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.json", "vocab.json", "merges.txt")]
)
def test_every_format_gives_the_same_ids(kept, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        if path.name not in kept:
            path.unlink()
    assert_equal_ids(GPT2Tokenizer.from_pretrained(tmp_path), small_tokenizer)


def test_openai_names(openai_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(SHIPPED / name, tmp_path)
    assert_equal_ids(GPT2Tokenizer.from_pretrained(tmp_path), openai_tokenizer)


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt2-xl", "openai-community/gpt2-medium", "distilgpt2", "distilbert/distilgpt2", "124M"]
)
def test_published_names_need_no_files(name: str, openai_tokenizer: GPT2Tokenizer) -> None:
    assert_equal_ids(GPT2Tokenizer.from_pretrained(name), openai_tokenizer)


def test_the_last_merge_is_read_with_and_without_a_line_end(tmp_path: Path) -> None:
    shutil.copy(SHIPPED / "encoder.json", tmp_path / "vocab.json")
    merges = (SHIPPED / "vocab.bpe").read_bytes()
    for content in (merges, merges.rstrip(b"\n"), merges.replace(b"\n", b"\r\n"), merges.removeprefix(b"#version: 0.2\n")):
        (tmp_path / "merges.txt").write_bytes(content)
        assert GPT2Tokenizer.from_pretrained(tmp_path).encode(" gazed") == [50255]


def test_files_saved_by_transformers_can_be_read(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small_tokenizer.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_equal_ids(GPT2Tokenizer.from_pretrained(tmp_path / "theirs"), small_tokenizer)
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(tmp_path / "padded")
    padded = GPT2Tokenizer.from_pretrained(tmp_path / "padded")
    assert padded.special_tokens == {"<|endoftext|>": 299, "[PAD]": 300} and padded.vocab_size == 301
    assert padded.encode("a[PAD]", allowed_special="all") == theirs.encode("a[PAD]")


def test_transformers_and_tokenizers_read_our_files(openai_tokenizer, small_tokenizer, tmp_path: Path) -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    for ours, folder in ((openai_tokenizer, tmp_path / "openai"), (small_tokenizer, tmp_path / "small")):
        ours.save_pretrained(folder)
        readers: list[Callable[[str], list[int]]] = [
            transformers.AutoTokenizer.from_pretrained(folder).encode,
            lambda text, folder=folder: tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids,
        ]
        for read in readers:
            for text in SAMPLES:
                assert read(text) == ours.encode(text, allowed_special="all")  # they always allow special tokens
        plain = tokenizers.ByteLevelBPETokenizer.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        for text in SAMPLES:
            assert plain.encode(text).ids == ours.encode(text)


def test_added_tokens_json_is_read_with_vocab_json(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<|pad|>": 300}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<|pad|>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<|pad|>", allowed_special="all")[-1] == 300
    assert tokenizer.vocab_size == 301


def edit_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def only_vocab_json(content: str | None = None, merges: str | None = None) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        if content is not None:
            (folder / "vocab.json").write_text(content)
        if merges is not None:
            (folder / "merges.txt").write_text(merges)

    return edit


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (only_vocab_json("{}"), "vocabulary is empty"),
        (only_vocab_json("{"), "not valid JSON"),
        (only_vocab_json("[]"), "must contain a JSON object"),
        (only_vocab_json('{"a": 0}'), "which the vocabulary lacks"),
        (only_vocab_json('{"a": "0"}'), "has the id '0'"),
        (only_vocab_json('{"a": 4294967296}'), "has the id 4294967296: ids must be whole numbers from 0 to 4294967295"),
        (only_vocab_json(merges="#version: 0.2\nz q\n"), "need the token 'zq'"),
        (only_vocab_json(merges="a b c\n"), "must be two tokens"),
        (lambda folder: (folder / "tokenizer.json").write_text(""), "not valid JSON"),
        (edit_json("tokenizer.json", lambda c: c["model"].update(type="WordPiece")), "does not contain a BPE model"),
        (edit_json("tokenizer.json", lambda c: c["model"].update(vocab={})), "vocabulary is empty"),
        (edit_json("tokenizer.json", lambda c: c["model"].update(merges=[["a"]])), "must be two tokens"),
        (edit_json("tokenizer.json", lambda c: c["model"].update(merges=None)), "no list of merges"),
        (edit_json("tokenizer.json", lambda c: c["model"].update(dropout=0.1)), "model has dropout=0.1, not None"),
        (edit_json("tokenizer.json", lambda c: c["model"].update(byte_fallback=True)), "byte_fallback=True"),
        (edit_json("tokenizer.json", lambda c: c.update(normalizer={"type": "NFC"})), "normalizer"),
        (edit_json("tokenizer.json", lambda c: c.update(pre_tokenizer=None)), "is missing, not GPT-2's ByteLevel"),
        (edit_json("tokenizer.json", lambda c: c["pre_tokenizer"].update(add_prefix_space=True)), "add_prefix_space=True"),
        (edit_json("tokenizer.json", lambda c: c["pre_tokenizer"].update(use_regex=False)), "use_regex=False"),
        (edit_json("tokenizer.json", lambda c: c.update(added_tokens=[{"id": 1}])), "needs an id and a content"),
        (edit_json("tokenizer_config.json", lambda c: c.update(add_prefix_space=True)), "add_prefix_space"),
    ],
)  # fmt: skip
def test_broken_files_are_errors(break_it, message: str, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    break_it(tmp_path)
    with pytest.raises(VocabularyError, match=message) as caught:
        GPT2Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="has no tokenizer files"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelNotFoundError):
        load_tokenizer("no-such-owner/no-such-model")
    with pytest.raises(GPT2Error):
        load_tokenizer(5)


def test_saving_removes_the_files_of_another_tokenizer(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    characters = CharTokenizer.from_texts("abc")
    (tmp_path / "added_tokens.json").write_text('{"<|stale|>": 9}')
    for tokenizer in (small_tokenizer, characters, small_tokenizer):
        tokenizer.save_pretrained(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert type(loaded) is type(tokenizer) and loaded.special_tokens == tokenizer.special_tokens


def add_token(**entry: object) -> Callable[[Path], object]:
    return edit_json("tokenizer.json", lambda content: content["added_tokens"].append(entry))


def add_beside(name: str, content: object) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (add_token(id=64, content="<x>", special=True), "'<x>' has the id 64, which 'a' has too"),
        (add_token(id=300, content="a", special=True), "'a' has the id 300, but 64 in the vocabulary"),
        (add_token(id=300, content="", special=True), "at least one character"),
        (add_token(id=300, content="\ud800", special=True), "without surrogates"),
        (add_token(id=300, content=5, special=True), "needs an id and a content"),
        (add_token(id="x", content="<x>", special=True), "has the id 'x'"),
        (edit_json("tokenizer_config.json", lambda c: c.update(added_tokens_decoder=[1])), "must map ids to tokens"),
    ],
)
def test_invalid_added_tokens_are_errors(edit, message, small_tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    edit(tmp_path)
    with pytest.raises(VocabularyError, match=message):
        GPT2Tokenizer.from_pretrained(tmp_path)


def test_added_tokens_json_is_read_with_tokenizer_json(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    add_beside("added_tokens.json", {"[PAD]": 300})(tmp_path)
    add_beside("special_tokens_map.json", {"pad_token": {"content": "[PAD]"}})(tmp_path)
    assert load_tokenizer(tmp_path).special_tokens == {"<|endoftext|>": 299, "[PAD]": 300}


def test_the_tokenizer_json_on_the_hub(openai_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """The file of openai-community/gpt2 is from 2021: no type, merges as text, no use_regex, a ByteLevel post-processor."""

    def make_old(content: dict) -> None:
        model = content["model"]
        for key in ("type", "byte_fallback", "ignore_merges"):
            del model[key]
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        content.update(pre_tokenizer=byte_level, post_processor={**byte_level, "trim_offsets": False}, decoder=byte_level)

    openai_tokenizer.save_pretrained(tmp_path)
    edit_json("tokenizer.json", make_old)(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    assert_equal_ids(GPT2Tokenizer.from_pretrained(tmp_path), openai_tokenizer)


def test_truncated_merges_are_an_error(tmp_path: Path) -> None:
    shutil.copy(SHIPPED / "encoder.json", tmp_path / "vocab.json")
    lines = (SHIPPED / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    for kept in (0, 1, 20_000, 49_000):
        (tmp_path / "merges.txt").write_text("\n".join(lines[:kept]), encoding="utf-8")
        with pytest.raises(VocabularyError, match="the merges are truncated"):
            GPT2Tokenizer.from_pretrained(tmp_path)


def test_two_tokens_with_the_same_id_are_an_error(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    edit_json("tokenizer.json", lambda content: content["model"]["vocab"].update({"th": 64, "he": 64}))(tmp_path)
    with pytest.raises(VocabularyError, match="both have the id 64"):
        GPT2Tokenizer.from_pretrained(tmp_path)


def test_a_published_name_may_be_a_path(openai_tokenizer: GPT2Tokenizer) -> None:
    assert_equal_ids(GPT2Tokenizer.from_pretrained(Path("gpt2")), openai_tokenizer)


def test_a_byte_order_mark_is_ignored(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert_equal_ids(GPT2Tokenizer.from_pretrained(tmp_path), small_tokenizer)


def test_a_token_outside_the_alphabet_decodes_to_its_text_as_in_tokenizers() -> None:
    """U+00AD, U+007F and blanks are in Latin-1 but not in the alphabet."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (pip install '.[test]')")
    token_ids = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}
    odd = ["a\xadb", "\xa0", "x y", "\x7f", "é\xad", "Ġé", "日"]
    token_ids |= {token: 256 + n for n, token in enumerate(odd)}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(token_ids, []))
    theirs.decoder = tokenizers.decoders.ByteLevel()
    ours = GPT2Tokenizer(Vocabulary(token_ids, []))
    for token in odd:
        assert ours.decode([token_ids[token]]) == theirs.decode([token_ids[token]])
