"""`gpt2 merge` and adapters given to other commands: the same text as from the merged model, and one line per error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.adapters.files import save_adapter
from gpt2.adapters.lora import add_lora, lora_parameters
from gpt_config import LoRAConfig
from gpt_encoder import GPT2Tokenizer, load_tokenizer
from gpt_test.conftest import TRAINING_TEXT, transformers_twin

IDS = torch.tensor([[1, 5, 2, 7]])


@pytest.fixture
def base(small_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_folder, tmp_path / "base"))


@pytest.fixture
def adapted(base: Path) -> GPT2:
    model = GPT2.from_pretrained(base)
    add_lora(model, LoRAConfig(rank=3))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def adapter(adapted: GPT2, base: Path, tmp_path: Path) -> Path:
    save_adapter(adapted, tmp_path / "adapter", base_model=base)
    return tmp_path / "adapter"


def test_the_merged_folder_is_an_ordinary_model(
    run_command: Callable, adapter: Path, adapted: GPT2, base: Path, tmp_path: Path, small_tokenizer: GPT2Tokenizer
) -> None:
    result = run_command("merge", adapter, "--out", tmp_path / "merged")
    assert (result.status, result.out) == (0, "") and result.err == f"done: the merged model is in {tmp_path / 'merged'}\n"
    shutil.rmtree(base)
    merged = GPT2.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS), adapted(IDS), atol=1e-5, rtol=0)
    assert load_tokenizer(tmp_path / "merged").encode(TRAINING_TEXT) == small_tokenizer.encode(TRAINING_TEXT)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, transformers_twin(merged)(IDS).logits, atol=1e-6, rtol=0)


def test_commands_accept_an_adapter_as_a_model(run_command: Callable, adapter: Path, base: Path, tmp_path: Path) -> None:
    run_command("merge", adapter, "--out", tmp_path / "merged")
    (tmp_path / "text").write_text(TRAINING_TEXT)
    names = ("adapter", "merged", "base")
    calls = [["generate", "The cat", "--max_tokens", 12], ["evaluate", tmp_path / "text", "--context", 20]]
    for call in calls:
        results = [run_command(*call, "--from_pretrained", tmp_path / name) for name in names]
        assert [result.status for result in results] == [0, 0, 0]
        texts = [result.out.replace(str(tmp_path / name), "") for result, name in zip(results, names, strict=True)]
        assert texts[0] == texts[1] != texts[2]


def test_training_starts_from_an_adapter(run_command: Callable, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TRAINING_TEXT * 3)
    options = ["--context", 8, "--batch_size", 2, "--max_steps", 1, "--sample_tokens", 0]
    options += ["--learning_rate", 0, "--min_learning_rate", 0]
    paths = ["--data", tmp_path / "text", "--out", tmp_path / "run", "--init_from", adapter]
    result = run_command("train", *paths, *options)
    assert result.status == 0, result.err
    assert torch.equal(GPT2.from_pretrained(tmp_path / "run")(IDS), GPT2.from_pretrained(adapter)(IDS))


def test_another_folder_of_the_base_model_can_be_named(
    run_command, adapter: Path, base: Path, tmp_path: Path, monkeypatch
) -> None:
    base.rename(tmp_path / "moved")
    result = run_command("merge", adapter, "--out", tmp_path / "merged")
    (line,) = result.err.splitlines()
    assert result.status == 1 and str(adapter) in line and str(base) in line and "gpt2 merge --from_pretrained" in line
    monkeypatch.chdir(tmp_path)
    assert run_command("merge", "adapter", "--out", "merged", "--from_pretrained", "moved").status == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    result = run_command("generate", "x", "--from_pretrained", "adapter")
    assert result.status == 1 and "does not name its base model" in result.err


def test_nothing_is_overwritten(run_command: Callable, adapter: Path, base: Path, tmp_path: Path) -> None:
    for out in (base, adapter):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        result = run_command("merge", adapter, "--out", out)
        assert result.status == 2 and "already contains a model or an adapter: choose another folder" in result.err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    assert run_command("merge", adapter, "--out", tmp_path / "notes").status == 0
    (tmp_path / "text").write_text(TRAINING_TEXT)
    result = run_command("train", "--data", tmp_path / "text", "--out", adapter)
    assert result.status == 2 and "which training would overwrite" in result.err


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["{base}", "--out", "{out}"], 1, "contains no adapter_config.json: name the folder of an adapter"),
        (["no/such/place", "--out", "{out}"], 1, "there is no folder 'no/such/place'"),
        (["{adapter}"], 2, "Missing option '--out'"),
        (
            ["{adapter}", "--out", "{out}", "--from_pretrained", "{adapter}"],
            1,
            "contains an adapter, but a whole model is needed",
        ),
        (["{adapter}", "--out", "{out}", "--from_pretrained", "no/such"], 1, "'no/such' is neither a folder"),
        (["{adapter}", "--out", "{base}/config.json/x"], 1, "cannot write"),
        (["{adapter}", "--out", ""], 2, "--out is empty"),
    ],
)
def test_a_mistake_is_one_line(run_command, adapter, base, tmp_path: Path, args, status: int, message: str) -> None:
    places = {"adapter": adapter, "base": base, "out": tmp_path / "out"}
    result = run_command("merge", *[arg.format(**places) for arg in args])
    (line,) = result.err.splitlines()
    assert (result.status, result.out) == (status, "") and line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_what_needs_a_whole_model_refuses_an_adapter(run_command: Callable, adapter: Path) -> None:
    from gpt2.reference import python_gpt2
    from gpt2.reference.numpy_model import NumpyGPT2
    from gpt_config import CheckpointError

    result = run_command("verify", adapter)
    assert result.status == 1 and f"(gpt2 merge --out FOLDER {adapter})" in result.err
    for load in (NumpyGPT2.from_pretrained, python_gpt2.load_model):
        with pytest.raises(CheckpointError, match="contains an adapter, but a whole model is needed"):
            load(adapter)
