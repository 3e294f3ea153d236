"""Tokenizers as transformers and tokenizers write them: the same ids and roles, also after load and save."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2 import GPT2
from gpt2.weights.tokenizer import load_tokenizer_for
from gpt_encoder import GPT2Tokenizer, load_tokenizer
from gpt_test.conftest import TRAINING_TEXT
from gpt_test.gpt2.weights.layouts import model, transformers

tokenizers = pytest.importorskip("tokenizers")

# A special token in a text is ordinary text here, so texts with one are encoded with all of them allowed.
TEXTS = [
    "the cat sat",
    "  two\n\n lines\t",
    "naïve 日本 \U0001f600",
    "",
    "a<|endoftext|>b",
    "it's 12:30 [NEW] <s>x</s> [PAD]",
]
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


@pytest.fixture
def folder(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> Path:
    small_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "m"


def fast(folder: Path, **options: Any) -> Any:
    """transformers' tokenizer of the vocabulary of 300 tokens in `folder`."""
    return transformers.GPT2TokenizerFast.from_pretrained(folder.parent / "base", **options)


def token(text: str, **options: Any) -> Any:
    return transformers.AddedToken(text, **options)


def written(change: Callable[[Any], Any], **options: Any) -> Callable[[Path], None]:
    """A folder that transformers writes after `change` of its tokenizer."""

    def write(folder: Path) -> None:
        theirs = fast(folder, **options)
        change(theirs)
        theirs.save_pretrained(folder)

    return write


def core(*, special: tuple[str, ...] = ("<|endoftext|>",), **trainer: Any) -> Any:
    """A tokenizer that the library `tokenizers` has trained."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "vocab_size": 290, "show_progress": False, **trainer}
    made.train_from_iterator([TRAINING_TEXT], tokenizers.trainers.BpeTrainer(special_tokens=list(special), **options))
    return made


def wrapped(folder: Path, made: Any, **roles: Any) -> None:
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **roles).save_pretrained(folder)


def split_pipeline(folder: Path) -> None:
    made = core()
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    steps = tokenizers.pre_tokenizers
    made.pre_tokenizer = steps.Sequence(
        [steps.Split(tokenizers.Regex(pattern), "isolated"), steps.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.normalizer = tokenizers.normalizers.Sequence([])
    wrapped(folder, made, eos_token="<|endoftext|>")


def with_template(folder: Path) -> None:
    made = core(special=("<s>", "</s>", "[PAD]"))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    wrapped(folder, made, bos_token="<s>", eos_token="</s>", pad_token="[PAD]")


def roberta(folder: Path) -> None:
    made = core(special=("<s>", "<pad>", "</s>", "<unk>"))
    made.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    wrapped(folder, made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def byte_level_class(folder: Path) -> None:
    """tokenizers' own class for GPT-2, whose two files become a GPT2Tokenizer."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([TRAINING_TEXT], vocab_size=290, special_tokens=["<|endoftext|>"], show_progress=False)
    folder.mkdir()
    made.save_model(str(folder))


def byte_level_json(folder: Path) -> None:
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([TRAINING_TEXT], vocab_size=290, special_tokens=["<s>", "</s>"], show_progress=False)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    roles = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def as_before_2022(folder: Path) -> None:
    """The files of a slow tokenizer: added_tokens.json has the ids, special_tokens_map.json the roles."""
    fast(folder).save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    vocabulary = json.loads((folder.parent / "base" / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_bytes((folder.parent / "base" / "merges.txt").read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 300, "[NEW]": 301}))
    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "[PAD]"}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 40}))


def two_files(folder: Path) -> None:
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((folder.parent / "base" / name).read_bytes())


def learned_from(folder: Path) -> None:
    fast(folder).train_new_from_iterator([TRAINING_TEXT], 290, show_progress=False).save_pretrained(folder)


MORE_SPECIAL = {"additional_special_tokens": ["<s>", "[NEW]"]}

TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "as it is": written(lambda theirs: None),
    "a pad token": written(lambda theirs: theirs.add_special_tokens({"pad_token": "[PAD]"})),
    "the end token as pad": written(lambda theirs: setattr(theirs, "pad_token", theirs.eos_token)),
    "roles": written(lambda theirs: theirs.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})),
    "an ordinary added token": written(lambda theirs: theirs.add_tokens(["[NEW]", "it's"])),
    "a token with blanks": written(lambda theirs: theirs.add_tokens([token("[NEW]", lstrip=True, rstrip=True)])),
    "a single word": written(lambda theirs: theirs.add_tokens([token("at", single_word=True)])),
    "found before the others": written(lambda theirs: theirs.add_tokens(["it's", token("s 1", normalized=False)])),
    "special without a role": written(lambda theirs: theirs.add_special_tokens(MORE_SPECIAL)),
    "many specials": written(lambda theirs: theirs.add_tokens([f"<{n}>" for n in range(150)], special_tokens=True)),
    "no roles": written(lambda theirs: None, bos_token=None, eos_token=None, unk_token=None),
    "a bos in front": written(lambda theirs: None, add_bos_token=True),
    "a chat template": written(lambda theirs: setattr(theirs, "chat_template", "{{ messages }}")),
    "learned from another tokenizer": learned_from,
    "two files": two_files,
    "files before 2022": as_before_2022,
    "trained by tokenizers": lambda folder: wrapped(folder, core(), eos_token="<|endoftext|>"),
    "split, then bytes": split_pipeline,
    "a template": with_template,
    "RoBERTa's ends": roberta,
    "ByteLevelBPETokenizer": byte_level_class,
    "ByteLevelBPETokenizer in one file": byte_level_json,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_roles_are_those_of_transformers(name: str, folder: Path, tmp_path: Path) -> None:
    TOKENIZERS[name](folder)
    has_class = (folder / "tokenizer_config.json").exists()
    theirs = (transformers.AutoTokenizer if has_class else transformers.GPT2Tokenizer).from_pretrained(folder)
    ours = load_tokenizer(folder)
    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert ours.vocab_size == len(theirs) == len(again)
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text, allowed_special="all") == expected == again(text)["input_ids"], text
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, allowed_special="all", add_special_tokens=False) == plain
        assert ours.decode(plain) == theirs.decode(plain, clean_up_tokenization_spaces=False)
    for role in ROLES:
        assert ours.roles.get(role) == getattr(theirs, role) == getattr(again, role), role
        if role != "unk_token":
            assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_id") == getattr(again, f"{role}_id")


def test_a_tokenizer_with_more_ids_than_rows_belongs_to_its_model(folder: Path) -> None:
    """A pad token added without resizing: very common."""
    model().save_pretrained(folder)
    TOKENIZERS["a pad token"](folder)
    ours = GPT2.from_pretrained(folder)
    assert load_tokenizer_for(ours).pad_token_id == 300 == ours.config.vocab_size
