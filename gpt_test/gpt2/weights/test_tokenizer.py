"""The tokenizer of a model: another kind of tokenizer in its folder is never replaced by OpenAI's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2, complete
from gpt2.cli.train import train
from gpt2.evaluation.items import encode_pair
from gpt2.evaluation.token_scores import score_tokens
from gpt2.finetuning.instructions import Turn, make_examples
from gpt2.finetuning.run import prepare_finetuning
from gpt2.finetuning.template import InstructionTemplate
from gpt2.training.token_file import TokenFile
from gpt2.weights.tokenizer import load_tokenizer_for, tokenizer_of
from gpt_config import FinetuningConfig, GPT2Config, GPT2Warning, VocabularyError
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import TRAINING_TEXT, random_model


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


def folder_with_ends(folder: Path, tokenizer: GPT2Tokenizer, eos_token: str | None, eos_token_id: object) -> Path:
    """A model with 302 rows: the 300 tokens of `tokenizer`, then </s> and <end>. <|endoftext|> is 299."""
    random_model(GPT2Config(vocab_size=302, n_positions=40, n_embd=12, n_layer=1, n_head=3)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    special = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    tokens = [{"id": 300, "content": "</s>", **special}, {"id": 301, "content": "<end>", **special}]
    for name, change in (
        ("config.json", {"eos_token_id": eos_token_id}),
        ("generation_config.json", {"eos_token_id": eos_token_id}),
        ("tokenizer_config.json", {"eos_token": eos_token}),
    ):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | change))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] += tokens
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


ENDS = [
    ("</s>", 300, 300), ("</s>", [299, 300], 300), ("<|endoftext|>", 301, 301), ("</s>", [301, 299], 301),
    ("</s>", None, 300), ("</s>", -1, 300), (None, 301, 301), (None, None, 299), ("</s>", 50256, 300),
]  # fmt: skip


@pytest.mark.parametrize(("eos_token", "eos_token_id", "expected"), ENDS)
def test_one_end_token_for_scoring_training_and_instructions(
    eos_token: str | None, eos_token_id: object, expected: int, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    folder = folder_with_ends(tmp_path / "model", small_tokenizer, eos_token, eos_token_id)
    model = GPT2.from_pretrained(folder)
    tokenizer = load_tokenizer_for(model)
    assert tokenizer.eot_token_id == expected
    assert encode_pair(tokenizer, "", "the cat")[0] == [expected]
    ids = [expected, *tokenizer.encode("the cat")]
    log_probs = model(torch.tensor([ids]))[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    found = [score.log_prob for score in score_tokens(model, tokenizer, "the cat")]
    assert found == pytest.approx(log_probs.tolist(), abs=1e-5)
    (example,), *_ = make_examples([[Turn("the", "cat")]], tokenizer, InstructionTemplate(), 40)
    assert example.ids[-1] == expected


def ends_in(folder: Path) -> list[list[int]]:
    """The end tokens in the two configs of a folder."""
    ends = (json.loads((folder / name).read_text())["eos_token_id"] for name in ("config.json", "generation_config.json"))
    return [end if isinstance(end, list) else [end] for end in ends]


@pytest.mark.parametrize(("eos_token", "eos_token_id", "expected"), [ENDS[2], ENDS[4], ENDS[3]])
def test_generation_ends_at_what_training_writes(
    eos_token: str, eos_token_id: object, expected: int, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    folder = folder_with_ends(tmp_path / "model", small_tokenizer, eos_token, eos_token_id)
    text = tmp_path / "text.txt"
    text.write_text(TRAINING_TEXT * 2)
    size = ["--batch_size", "1", "--max_steps", "1", "--sample_tokens", "0", "--quiet", "--device", "cpu", "--context", "8"]
    options = ["--data", str(text), "--out", str(tmp_path / "run"), "--init_from", str(folder), *size]
    train.main(options, "train", standalone_mode=False)
    tuning = prepare_finetuning(folder, [text], FinetuningConfig(task="text", max_steps=1, context=8), tmp_path / "tuned")
    tuning.trainer.train()
    for run in (tmp_path / "run", tmp_path / "tuned"):
        assert TokenFile.open(run / "data" / "val.bin").tokens[-1] == expected
        assert all(expected in ends for ends in ends_in(run))


def test_an_ordinary_word_as_end_token_is_a_warning(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    folder = folder_with_ends(tmp_path / "model", small_tokenizer, "</s>", 20)
    with pytest.warns(GPT2Warning, match=r"the config ends texts with '.' \(20\), .* and the tokenizer with '</s>' \(300\)"):
        tokenizer = load_tokenizer_for(GPT2.from_pretrained(folder))
    assert tokenizer.eot_token_id == 300


@pytest.mark.parametrize("eos_token_id", [20, [20, 300], None, 300])
def test_generation_ends_at_the_tokens_of_the_config_as_in_transformers(
    eos_token_id: object, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    """The tokenizer's end token </s> (300), which is generated at each step, ends a text only if the config says so."""
    transformers = pytest.importorskip("transformers")
    folder = folder_with_ends(tmp_path / "model", small_tokenizer, "</s>", eos_token_id)
    generate = transformers.pipeline("text-generation", model=str(folder), tokenizer=str(folder), device="cpu")
    options = {"max_new_tokens": 4, "do_sample": False, "sequence_bias": [[[300], 1000.0]]}
    theirs = generate("the cat", return_tensors=True, **options)[0]["generated_token_ids"]
    model = GPT2.from_pretrained(folder)
    with warnings.catch_warnings(action="ignore"):  # config and tokenizer differ
        tokenizer = load_tokenizer_for(model)
    ours = complete(model, tokenizer, "the cat", max_new_tokens=4, logit_bias={300: 1000.0})[0]
    assert [*ours.prompt_ids, *ours.ids] == list(theirs)
    assert len(ours.ids) == (1 if 300 in model.config.eos_token_ids else 4)


def test_an_end_token_without_a_row_is_none(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    folder = folder_with_ends(tmp_path / "model", small_tokenizer, "</s>", 299)
    random_model(GPT2Config(vocab_size=300, n_embd=12, n_layer=1, n_head=3, eos_token_id=299)).save_pretrained(folder)
    content = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(content | {"eos_token": "</s>"}))
    assert load_tokenizer_for(GPT2.from_pretrained(folder)).eot_token_id == 299
