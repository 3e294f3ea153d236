"""Mangled vocabularies, adapters, classifiers, checkpoints and run files: the right result, or one line of a GPT2Error."""

from __future__ import annotations

import json
import shutil
from array import array
from pathlib import Path
from random import Random

import click
import pytest
import torch

from gpt2 import GPT2
from gpt2.adapters.files import save_adapter
from gpt2.adapters.lora import add_lora, named_lora_parameters
from gpt2.cli.train import train
from gpt2.finetuning.classifier import GPT2Classifier
from gpt2.finetuning.classifier_files import load_classifier, save_classifier
from gpt2.finetuning.template import InstructionTemplate
from gpt2.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gpt2.training.run_logs import read_metrics
from gpt2.training.token_file import TokenFile, TokenWriter
from gpt_config import GPT2Error, LoRAConfig
from gpt_encoder import CharTokenizer, GPT2Tokenizer, load_tokenizer
from gpt_test.fuzz.mangling import FEW_OR_MANY, mangled_bytes, mangled_json, outcome

TEXTS = ("The owl saw a fish.", "  two\n\nlines\t", "naïve 日本 \U0001f600", "")


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "replace"))


@FEW_OR_MANY
@pytest.mark.parametrize("files", [["vocab.json", "merges.txt"], ["tokenizer.json"]], ids=" and ".join)
def test_vocabulary(n_files: int, files: list[str], small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """A tokenizer that loads gives each text back."""
    small_tokenizer.save_pretrained(tmp_path / "whole")
    folder, random = tmp_path / "mangled", Random(0)
    for number in range(n_files):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in [*files, "tokenizer_config.json"]:
            shutil.copy(tmp_path / "whole" / name, folder)
        (folder / "added_tokens.json").write_text('{"<pad>": 300}')
        (folder / "special_tokens_map.json").write_text('{"pad_token": "<pad>", "eos_token": {"content": "<|endoftext|>"}}')
        changed = folder / random.choice(
            [*files, *files, "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"]
        )
        if changed.suffix == ".json" and random.random() < 0.8:
            write(changed, mangled_json(json.loads(changed.read_text()), random))
        else:
            changed.write_bytes(mangled_bytes(changed.read_bytes(), random))
        what = f"file {number}, {changed.name}"
        tokenizer = outcome(lambda: load_tokenizer(folder), what)
        for text in TEXTS if tokenizer is not None else ():
            ids = outcome(lambda text=text, tokenizer=tokenizer: tokenizer.encode(text), what)
            assert ids is None or tokenizer.decode(ids) == text, (what, text)


@FEW_OR_MANY
def test_character_vocabulary(n_files: int, tmp_path: Path) -> None:
    tokenizer, random = CharTokenizer.from_texts(["the owl"]), Random(1)
    for number in range(n_files):
        write(tmp_path / "char_vocab.json", mangled_json(list(tokenizer.characters), random))
        loaded = outcome(lambda: load_tokenizer(tmp_path), f"file {number}")
        ids = None if loaded is None else outcome(lambda loaded=loaded: loaded.encode("the"))
        assert ids is None or loaded.decode(ids) == "the"


@FEW_OR_MANY
def test_adapter(n_files: int, small_model: GPT2, small_folder: Path, tmp_path: Path) -> None:
    """An adapter that loads has the numbers of its file, and the scale of its config."""
    model = GPT2.from_pretrained(small_folder)
    add_lora(model, LoRAConfig(rank=2, alpha=4, target_modules=("c_attn", "mlp.c_fc")))
    with torch.no_grad():
        for _, parameter in named_lora_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_adapter(model, tmp_path, base_model=small_folder)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    values, content, random = json.loads(config.read_text()), weights.read_bytes(), Random(2)
    ids, expected = torch.tensor([[1, 2, 3]]), GPT2.from_pretrained(tmp_path)(torch.tensor([[1, 2, 3]]))
    for number in range(n_files):
        text = mangled_json(values, random)
        if random.random() < 0.7:
            write(config, text)
            weights.write_bytes(content)
        else:
            write(config, json.dumps(values))
            weights.write_bytes(mangled_bytes(content, random, end=8 + int.from_bytes(content[:8], "little")))
        loaded = outcome(lambda: GPT2.from_pretrained(tmp_path), f"file {number}: {text[:1000]!r}")
        if loaded is None:
            continue
        found = json.loads(config.read_bytes())
        if (found["lora_alpha"], found.get("use_rslora") or False) == (4, False):
            assert torch.equal(loaded(ids), expected), text
        else:
            assert loaded(ids).isfinite().all() and not torch.equal(loaded(ids), expected), text


@FEW_OR_MANY
def test_classifier(n_files: int, small_folder: Path, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """A classifier that loads has a label for each output."""
    torch.manual_seed(0)
    classifier = GPT2Classifier(GPT2.from_pretrained(small_folder), ["good", "bad", "neither"], 20).eval()
    save_classifier(classifier, tmp_path, small_tokenizer)
    ids, random = torch.tensor([[1, 2, 3]]), Random(3)
    expected = classifier(ids)
    whole = {name: (tmp_path / name).read_bytes() for name in ("classifier.json", "config.json")}
    for number in range(n_files):
        name = random.choice(list(whole))
        for other, content in whole.items():
            (tmp_path / other).write_bytes(content)
        if random.random() < 0.3:
            (tmp_path / "classifier.json").unlink()
            name = "config.json"
        text = mangled_json(json.loads(whole[name]), random)
        write(tmp_path / name, text)
        loaded = outcome(lambda: load_classifier(tmp_path), f"file {number}, {name}: {text[:1000]!r}")
        if loaded is None:
            continue
        assert len(loaded.labels) == 3, text
        found = json.loads((tmp_path / "config.json").read_bytes())
        if all(
            found.get(key) == value
            for key, value in json.loads(whole["config.json"]).items()
            if key[:3] not in ("id2", "lab")
        ):
            assert torch.equal(loaded(ids), expected), text


@FEW_OR_MANY
def test_checkpoint(n_files: int, tmp_path: Path) -> None:
    """A checkpoint has a checksum, so one that loads is the one that was saved."""
    tensors = {"model.a": torch.arange(60.0).view(20, 3), "optimizer.a.step": torch.tensor(5.0)}
    values = {"step": 5, "best_loss": 1.5, "n_since_best": 0}
    path, random = save_checkpoint(tmp_path, Checkpoint(tensors, values)), Random(4)
    content = path.read_bytes()
    for number in range(n_files):
        path.write_bytes(mangled_bytes(content, random))
        loaded = outcome(lambda: load_checkpoint(tmp_path), f"file {number}")
        if loaded is not None:
            assert loaded.values == values and loaded.tensors.keys() == tensors.keys()
            assert all(torch.equal(tensor, loaded.tensors[name]) for name, tensor in tensors.items())


@FEW_OR_MANY
def test_run_file(n_files: int, text_of_a_run: Path) -> None:
    """The run has no data: a run file with possible values ends with the error for these."""
    path, random = text_of_a_run / "training.json", Random(5)
    values = json.loads(path.read_text())

    def resume() -> None:
        try:
            train.main(["--resume", str(text_of_a_run), "--quiet", "--device", "cpu"], "train", standalone_mode=False)
        except click.ClickException as error:  # what a command makes of a GPT2Error
            raise GPT2Error(error.format_message()) from None

    for number in range(n_files):
        text = mangled_json(values, random)
        write(path, text)
        outcome(resume, f"file {number}: {text[:2000]!r}")


@pytest.mark.parametrize(
    ("name", "value"), [("engine", "x"), ("n_layer", "1"), ("data", 5), ("workers", 1.5), ("validation_fraction", [0.1])]
)
def test_an_option_of_a_run_file_must_have_a_possible_value(name: str, value: object, text_of_a_run: Path) -> None:
    path = text_of_a_run / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(click.ClickException, match=f"is damaged \\({name}="):
        train.main(["--resume", str(text_of_a_run), "--quiet", "--device", "cpu"], "train", standalone_mode=False)


@pytest.fixture
def text_of_a_run(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the owl saw a fish. " * 300)
    size = ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--context", "8", "--batch_size", "2", "--max_steps", "1"]
    data = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--tokenizer", "char", "--quiet"]
    train.main([*data, *size, "--sample_tokens", "0", "--device", "cpu"], "train", standalone_mode=False)
    shutil.rmtree(tmp_path / "run" / "data")
    return tmp_path / "run"


@FEW_OR_MANY
def test_files_beside_a_run(n_files: int, tmp_path: Path) -> None:
    """Token files, metrics and templates."""
    with TokenWriter(tmp_path / "train.bin", 300, b"0" * 16) as writer:
        writer.append(array("H", range(300)).tobytes(), 900)
    tokens, random = (tmp_path / "train.bin").read_bytes(), Random(6)
    metrics = [{"step": step, "loss": 2.5} for step in range(4)]
    InstructionTemplate().save(tmp_path)
    template = next(path for path in tmp_path.iterdir() if path.suffix == ".json")
    fields = json.loads(template.read_text())
    for number in range(n_files):
        (tmp_path / "train.bin").write_bytes(mangled_bytes(tokens, random))
        outcome(lambda: TokenFile.open(tmp_path / "train.bin"), f"file {number}")
        write(tmp_path / "metrics.jsonl", "\n".join(mangled_json(line, random) for line in metrics))
        outcome(lambda: read_metrics(tmp_path), f"file {number}")
        write(template, mangled_json(fields, random))
        outcome(lambda: InstructionTemplate.load(tmp_path), f"file {number}")
