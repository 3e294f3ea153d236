"""Special tokens, added tokens, roles and pipelines: the same ids and roles as transformers on the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpt_config import InputError, VocabularyError
from gpt_encoder import GPT2Tokenizer, load_tokenizer
from gpt_encoder.pipeline import _PATTERNS

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[test]')")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (pip install '.[test]')")

LEARNED = ["the cat sat on the mat and the dog sat on the cat, hello world"] * 50
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
TEXTS = ["the cat sat", "<s>the cat</s><pad>", "a [NEW] b", "the[NEW]cat <mask> x", "x<mask>y z <unk>", ""]


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def learn(folder: Path, special: tuple[str, ...] = ("<s>", "<pad>", "</s>", "<unk>", "<mask>"), size: int = 290) -> None:
    """vocab.json and merges.txt, as ByteLevelBPETokenizer.save_model writes them: the special tokens have the first ids."""
    learner = tokenizers.ByteLevelBPETokenizer()
    learner.train_from_iterator(LEARNED, vocab_size=size, min_frequency=1, special_tokens=[*special], show_progress=False)
    learner.save_model(str(folder))
    write(folder, "config.json", {"model_type": "gpt2"})
    write(folder, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})


def assert_as_in_transformers(folder: Path, texts: list[str] = TEXTS, roles: tuple[str, ...] = ROLES) -> None:
    """The ids and roles of `folder`, and of the folder that is saved after loading it."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    ours.save_pretrained(folder / "saved")
    again = transformers.AutoTokenizer.from_pretrained(folder / "saved")
    for text in texts:
        expected = theirs.encode(text)
        assert ours.encode(text, allowed_special="all") == expected, text
        assert load_tokenizer(folder / "saved").encode(text, allowed_special="all") == expected, text
        assert again.encode(text) == expected, text
    for role in roles:
        assert getattr(again, role) == getattr(theirs, role), role
        if (theirs_id := getattr(theirs, f"{role}_id")) is not None:
            assert getattr(ours, f"{role}_id") == theirs_id == getattr(again, f"{role}_id"), role


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_special_tokens_are_found_by_their_role_alone(name: str, tmp_path: Path) -> None:
    learn(tmp_path)
    mask = {"content": "<mask>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    mask |= {"__type": "AddedToken"} if name == "tokenizer_config.json" else {}
    write(tmp_path, name, {"tokenizer_class": "GPT2Tokenizer", **NAMES, "additional_special_tokens": ["<mask>"]})
    assert_as_in_transformers(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    assert (tokenizer.eot_token_id, tokenizer.pad_token_id) == (2, 1)
    write(tmp_path, name, {"tokenizer_class": "GPT2Tokenizer", **NAMES, "mask_token": mask})
    assert_as_in_transformers(tmp_path)


def test_roles_of_a_saved_fast_tokenizer(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"pad_token": "[PAD]", "bos_token": "<|bos|>"})
    theirs.add_tokens(["[NEW]"])
    theirs.save_pretrained(tmp_path / "theirs")
    assert_as_in_transformers(tmp_path / "theirs", [*TEXTS, "<|bos|>a[PAD]<|endoftext|>"])
    tokenizer = load_tokenizer(tmp_path / "theirs")
    assert tokenizer.added_tokens == {"[NEW]": 302} and "[NEW]" not in tokenizer.special_tokens
    assert tokenizer.decode(tokenizer.encode("a [NEW] b")) == "a [NEW] b"


def test_ordinary_added_tokens_are_found_in_every_text(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    write(tmp_path, "added_tokens.json", {"[NEW]": 300, "[NEW]x": 301})
    assert_as_in_transformers(tmp_path, [*TEXTS, "[NEW]x[NEW] the"])
    tokenizer = load_tokenizer(tmp_path)
    expected = tokenizer.encode("a [NEW]x b")
    assert 301 in expected
    assert tokenizer.encode_batch(["a [NEW]x b"], n_workers=1) == [expected]
    assert memoryview(tokenizer.encode_each_packed(["a", "a [NEW]x b"])[1]).cast("I").tolist() == expected
    long = "the cat [NEW]x sat " * 4000
    assert tokenizer.encode(long) == transformers.AutoTokenizer.from_pretrained(tmp_path).encode(long)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
@pytest.mark.parametrize("special", [True, False])
def test_the_flags_of_added_tokens(flag: str, special: bool, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    content["added_tokens"].append({"id": 300, "content": "<m>", "special": special, **flags, flag: True})
    content["added_tokens"].append({"id": 301, "content": "m>", "special": special, **flags})
    write(tmp_path, "tokenizer.json", content)
    assert_as_in_transformers(
        tmp_path, ["a <m> b", "a  \n<m>\t  b", "a<m>b", "a.<m>.b", "<m> <m><m>", "x<m> \x1c m>", "é<m>"]
    )


def test_more_than_100_special_tokens(tmp_path: Path) -> None:
    special = tuple(f"<unused{n}>" for n in range(120))
    learn(tmp_path, special, 420)
    assert_as_in_transformers(tmp_path, ["the cat sat<unused7>"], ())  # in no file but vocab.json: ordinary text
    write(tmp_path, "special_tokens_map.json", {"additional_special_tokens": special})
    assert_as_in_transformers(tmp_path, ["the cat sat<unused7>"], ())
    assert load_tokenizer(tmp_path).encode("<unused7>", allowed_special="all") == [7]


def test_a_vocabulary_without_some_bytes(tmp_path: Path) -> None:
    """The tokenizer of the Hugging Face course: BpeTrainer without an initial alphabet."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=100, special_tokens=["<|endoftext|>"], show_progress=False)
    made.train_from_iterator(["the cat sat on the mat"] * 10, trainer=trainer)
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    transformers.GPT2TokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    known = ["the cat sat", "that mat", "the cat<|endoftext|>", "the cat sat on the mat " * 3000]
    assert_as_in_transformers(tmp_path, known)
    tokenizer = load_tokenizer(tmp_path)
    for text in ("the cat!", "the cat! " * 9000, "é"):
        with pytest.raises(InputError, match="none for 0x21 in '!'" if "!" in text else "none for 0xc3 in 'é'"):
            tokenizer.encode(text)
        with pytest.raises(InputError, match="of the 256 bytes"):
            tokenizer.encode_batch([text], n_workers=1)


def special_ends(first: int, last: int) -> dict[str, Any]:
    eot = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [eot] * first + [{"Sequence": {"id": "A", "type_id": 0}}] + [eot] * last,
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [299], "tokens": ["<|endoftext|>"]}},
    }


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ROBERTA = {
    "type": "RobertaProcessing",
    "sep": ["<|endoftext|>", 299],
    "cls": ["<|endoftext|>", 299],
    "trim_offsets": True,
    "add_prefix_space": False,
}


@pytest.mark.parametrize("class_name", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(
    ("post_processor", "first", "last"),
    [
        (special_ends(1, 0), 1, 0),
        (special_ends(0, 1), 0, 1),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, special_ends(1, 0)]}, 1, 0),
        (ROBERTA, 1, 1),
        (BYTE_LEVEL, 0, 0),
        (None, 0, 0),
    ],
)
def test_tokens_at_the_ends(post_processor, first, last, class_name, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    write(tmp_path, "tokenizer.json", content | {"post_processor": post_processor})
    eot = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": class_name, **eot, "add_bos_token": True})
    assert_as_in_transformers(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    plain = tokenizer.encode("the cat", add_special_tokens=False)
    assert plain == small_tokenizer.encode("the cat")
    assert tokenizer.encode("the cat") == [299] * first + plain + [299] * last
    assert tokenizer.encode_batch(["the cat"]) == [tokenizer.encode("the cat")]


@pytest.mark.parametrize("flags", [{"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": False}])
def test_add_bos_token_without_tokenizer_json(flags: dict[str, bool], tmp_path: Path) -> None:
    learn(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **NAMES, **flags})
    assert_as_in_transformers(tmp_path)


def split(
    pattern: str = _PATTERNS[0], behavior: str = "Isolated", invert: bool = False, regex: bool = False
) -> dict[str, Any]:
    first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [first, {**BYTE_LEVEL, "use_regex": regex}]}


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}},
        {"normalizer": {"type": "Sequence", "normalizers": []}},
        *({"pre_tokenizer": split(pattern)} for pattern in _PATTERNS),
        {"pre_tokenizer": split(regex=True)},
        {"pre_tokenizer": split(behavior="Removed", invert=True)},
    ],
)
def test_equivalent_pipelines_are_read(change: dict[str, Any], small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    write(tmp_path, "tokenizer.json", content | change)
    theirs, ours = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), load_tokenizer(tmp_path)
    for text in ("the cat's 12  mats\n", "a   b\n\n  c \t'll  ", "naïve 🦙½'s\u3000 x\x1c", " ", "\n \n"):
        assert ours.encode(text) == theirs.encode(text).ids, text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}, "the normalizer NFC changes the text"),
        ({"pre_tokenizer": split(r"\w+")}, "which is not GPT-2's pattern"),
        ({"pre_tokenizer": split(behavior="Removed")}, "behavior='Removed' and invert=False"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "is Whitespace, not GPT-2's ByteLevel"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 2}}, "is ByteLevel and ByteLevel"),
        ({"post_processor": {"type": "Other"}}, "the post_processor Other is not one"),
        (
            {"post_processor": special_ends(1, 0) | {"special_tokens": {}}},
            "the post_processor TemplateProcessing is not one",
        ),
    ],
)
def test_other_pipelines_are_refused(change, message: str, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    write(tmp_path, "tokenizer.json", content | change)
    with pytest.raises(VocabularyError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("class_name", ["BertTokenizer", "T5Tokenizer", "T5TokenizerFast"])
def test_another_tokenizer_is_refused_by_name(place: str, class_name: str, tmp_path: Path) -> None:
    learn(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    write(tmp_path, place, {"tokenizer_class": class_name})
    with pytest.raises(VocabularyError, match=f"{place} names the tokenizer {class_name}, which is not GPT-2's"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model"])
def test_the_file_of_another_tokenizer_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(VocabularyError, match=f"{name} is a"):
        load_tokenizer(tmp_path)


def test_two_files_of_any_name(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    vocab, merges = (tmp_path / "vocab.json").rename(tmp_path / "a"), (tmp_path / "merges.txt").rename(tmp_path / "b")
    tokenizer = GPT2Tokenizer.from_files(str(vocab), merges)
    assert tokenizer.encode("the cat<|endoftext|>", allowed_special="all") == small_tokenizer.encode(
        "the cat<|endoftext|>", allowed_special="all"
    )
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 299
    with pytest.raises(VocabularyError, match="cannot read"):
        GPT2Tokenizer.from_files(tmp_path / "missing", merges)


def test_two_ids_of_one_token_are_an_error(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    write(tmp_path, "added_tokens.json", {"<|endoftext|>": 300})
    with pytest.raises(VocabularyError, match="has the id 300, but 299 in another file"):
        load_tokenizer(tmp_path)
