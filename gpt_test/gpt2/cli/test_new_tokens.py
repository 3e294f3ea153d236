"""`--add_tokens` of gpt2 train and finetune: new tokens are learned, saved, used by templates, and survive a resumption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.finetuning.instructions import Turn, make_examples
from gpt2.finetuning.template import InstructionTemplate
from gpt2.generation.conversation import Conversation
from gpt2.generation.prompts import encode_prompt
from gpt2.training import TrainingData
from gpt2.weights.files import read_file, read_tensors
from gpt2.weights.tokenizer import load_tokenizer_for
from gpt_encoder import load_tokenizer

NEW = "<|user|>, <|assistant|>"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
QUIET = ["--quiet", "--sample_tokens", 0, "--batch_size", 2]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("<|user|>where does the boat go?<|assistant|>far away. " * 30)
    return path


@pytest.fixture
def ask(tmp_path: Path) -> Path:
    path = tmp_path / "ask.jsonl"
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("cat", "dog", "sea", "fish", "boat") * 2]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template.json"
    path.write_text(json.dumps({"instruction": "<|user|>{instruction}", "response": "<|assistant|>"}))
    return path


def test_training_encodes_and_learns_new_tokens(
    run_command: Callable, text: Path, small_folder: Path, tmp_path: Path
) -> None:
    start = ["train", "--data", text, "--init_from", small_folder, "--context", 16, "--max_steps", 4, "--eval_interval", 2]
    start += [*QUIET, "--special_tokens", "--add_tokens", NEW, "--checkpoint_interval", 2, "--keep", "last", "--workers", 1]
    for name in ("whole", "broken"):
        result = run_command(*start, "--out", tmp_path / name)
        assert result.status == 0, result.err
    base, n = GPT2.from_pretrained(small_folder), load_tokenizer(small_folder).vocab_size
    data, model = TrainingData.open(tmp_path / "whole" / "data"), GPT2.from_pretrained(tmp_path / "whole")
    assert {n, n + 1} <= set(data.train.tokens.tolist()) and model.config.vocab_size == n + 2
    mean = base.wte.weight.mean(0)
    assert (model.wte.weight[n:] - mean).abs().max() > 1e-3, "the rows begin as the mean and are trained"
    (tmp_path / "broken" / "checkpoints" / "step-00000004.safetensors").unlink()
    result = run_command("train", "--resume", tmp_path / "broken", "--add_tokens", NEW, "--quiet")
    assert result.status == 0 and "resumed" not in result.err, result.err
    found, expected = (read_tensors(tmp_path / name) for name in ("broken", "whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    result = run_command("train", "--resume", tmp_path / "broken", "--add_tokens", "<|other|>")
    assert result.status == 2 and "--add_tokens cannot change when a run is resumed" in result.err


def test_a_new_model_has_rows_for_new_tokens(run_command: Callable, text: Path, tmp_path: Path) -> None:
    sizes = ["--n_layer", 1, "--n_head", 1, "--n_embd", 8, "--context", 8, "--workers", 1]
    start = ["train", "--data", text, "--tokenizer", "bpe", "--vocab_size", 270, *sizes, *QUIET, "--max_steps", 1]
    result = run_command(*start, "--add_tokens", NEW, "--out", tmp_path / "run")
    assert result.status == 0 and "the text spells the special token '<|assistant|>'" in result.err
    tokenizer = load_tokenizer(tmp_path / "run")
    assert [tokenizer.special_tokens[name] for name in ("<|user|>", "<|assistant|>")] == [270, 271]
    assert GPT2.from_pretrained(tmp_path / "run").config.vocab_size == 272


@pytest.mark.parametrize("lora", [[], ["--lora_rank", 2, "--lora_dropout", "0.1"]])
def test_instructions_use_new_tokens(
    run_command: Callable, ask: Path, template: Path, small_folder: Path, tmp_path: Path, lora: list[object]
) -> None:
    start = ["finetune", "--task", "instruction", "--data", ask, "--from_pretrained", small_folder, *QUIET]
    start += ["--template", template, "--add_tokens", NEW, "--epochs", 1, "--keep", "last", *lora]
    for name in ("whole", "broken"):
        result = run_command(*start, "--out", tmp_path / name)
        assert result.status == 0, result.err
    model = GPT2.from_pretrained(tmp_path / "whole")
    tokenizer, loaded = load_tokenizer_for(model), InstructionTemplate.load(tmp_path / "whole")
    n = load_tokenizer(small_folder).vocab_size
    [user, assistant] = [tokenizer.special_tokens[name] for name in ("<|user|>", "<|assistant|>")]
    assert (user, assistant, model.config.vocab_size) == (n, n + 1, n + 2) and loaded.special_tokens
    ids = encode_prompt(tokenizer, loaded.prompt("Say <|user|>."))
    assert ids == [user, *tokenizer.encode("Say <|user|>."), assistant], "what a user spells is text"
    [example], *_ = make_examples([[Turn("Say cat.", "cat")]], tokenizer, loaded, 40)
    assert example.ids == [user, *tokenizer.encode("Say cat."), assistant, *tokenizer.encode("cat"), tokenizer.eot_token_id]
    conversation = Conversation(model, tokenizer, loaded)
    assert "".join(conversation.answer("Say cat.", max_new_tokens=3)) == tokenizer.decode(
        model.generate(torch.tensor([encode_prompt(tokenizer, loaded.prompt("Say cat."))]), max_new_tokens=3)[0, -3:]
    ).removesuffix("<|endoftext|>")
    result = run_command("generate", "--instruction", "Say cat.", "--from_pretrained", tmp_path / "whole", "--max_tokens", 2)
    assert result.status == 0, result.err
    last, *_ = sorted((tmp_path / "broken" / "checkpoints").glob("*"), reverse=True)
    last.unlink()  # as after a kill
    result = run_command("finetune", "--resume", tmp_path / "broken", "--quiet")
    assert result.status == 0 and "done: 5 steps" in result.err, result.err
    found, expected = (read_file(tmp_path / run / WEIGHTS[not lora]) for run in ("broken", "whole"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole")
    messages = [{"role": "user", "content": "Say cat."}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert theirs(rendered)["input_ids"] == encode_prompt(tokenizer, loaded.prompt("Say cat."))


def test_a_template_of_an_older_run_stays_text(small_folder: Path, template: Path) -> None:
    tokenizer = load_tokenizer(small_folder).with_special_tokens(["<|user|>"])
    old = InstructionTemplate.load(template)
    assert encode_prompt(tokenizer, old.prompt("Go.")) == tokenizer.encode("<|user|>Go.<|assistant|>")
    assert "special" not in repr(old), "older runs have a fingerprint of it"
    new = old.for_tokenizer(tokenizer)
    assert encode_prompt(tokenizer, new.prompt("Go."))[0] == tokenizer.special_tokens["<|user|>"]
    assert encode_prompt(tokenizer, new.prompt("Go."))[1:] == tokenizer.encode("Go.<|assistant|>"), "merges go on"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--add_tokens", "<|a|>,,"], "--add_tokens: the token '' must have at least one character"),
        (["--add_tokens", "<|a|>,<|a|>"], "--add_tokens: the token '<|a|>' is there twice"),
        (["--add_tokens", "a"], "'a' is already an ordinary token of this vocabulary"),
        (["--new_rows", "random"], "--new_rows is for the tokens of --add_tokens"),
        (["--add_tokens", "<|a|>", "--trainable", "last_block"], "--add_tokens=<|a|> would not be learned by trainable="),
        (["--add_tokens", "<|a|>", "--task", "classification"], "--add_tokens=<|a|> would not be learned by a classifier"),
    ],
)
def test_new_tokens_that_cannot_be(
    run_command: Callable, ask: Path, small_folder: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    start = ["finetune", "--task", "instruction", "--data", ask, "--out", tmp_path / "run", *QUIET]
    result = run_command(*start, "--from_pretrained", small_folder, *options)
    assert result.status in (1, 2) and words in result.err, result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and not (tmp_path / "run").exists()
