"""The tokenizer of a model: another kind of tokenizer in its folder is never replaced by OpenAI's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt2 import GPT2
from gpt2.weights.tokenizer import load_tokenizer_for, tokenizer_of
from gpt_config import GPT2Config, GPT2Warning, VocabularyError
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model


@pytest.fixture(scope="module")
def folder_of_openais_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_model(GPT2Config(n_positions=8, n_embd=4, n_layer=1, n_head=1)).save_pretrained(folder)
    for path in folder.glob("*token*"):
        path.unlink()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    return folder


def test_without_tokenizer_files_it_is_openais(folder_of_openais_size: Path) -> None:
    with pytest.warns(GPT2Warning, match="OpenAI's tokenizer, of the same size"):
        assert isinstance(tokenizer_of(GPT2.from_pretrained(folder_of_openais_size)), GPT2Tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", json.dumps({"tokenizer_class": "T5Tokenizer"}), "names the tokenizer T5Tokenizer"),
        ("tokenizer_config.json", json.dumps({"tokenizer_class": "BertTokenizer"}), "names the tokenizer BertTokenizer"),
        ("vocab.txt", "[PAD]", "vocab.txt is a WordPiece vocabulary"),
        ("spiece.model", "x", "spiece.model is a SentencePiece model"),
    ],
)
def test_another_kind_of_tokenizer_is_refused(name: str, content: str, message: str, folder_of_openais_size: Path) -> None:
    model = GPT2.from_pretrained(folder_of_openais_size)
    path = folder_of_openais_size / name
    path.write_text(content)
    try:
        assert tokenizer_of(model) is None
        with pytest.raises(VocabularyError, match=message):
            load_tokenizer_for(model)
    finally:
        path.unlink()
