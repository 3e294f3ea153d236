"""`gpt2 verify`: the table, the JSON, the exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import GPT2
from gpt_encoder import GPT2Tokenizer


@pytest.fixture
def folder(small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> Path:
    small_model.save_pretrained(tmp_path / "model", tokenizer=small_tokenizer)
    return tmp_path / "model"


def test_a_sound_model_passes_every_check(run_command: Callable, folder: Path) -> None:
    result = run_command("verify", folder)
    assert result.status == 0 and not result.err
    lines = result.out.splitlines()
    assert lines[0].split() == ["part", "subject", "against", "numbers", "largest", "relative", "allowed", "result"]
    assert any(line.startswith("loss and gradients") and "1e-10    pass" in line for line in lines)
    assert lines[-1].startswith(str(folder)) and "fail" not in lines[-1]
    assert any(line.startswith("allowed 1e-10: float64 rounds") for line in lines)


def test_json_of_a_model_with_nan_weights(run_command: Callable, folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["h.0.mlp.c_fc.weight"] = torch.full_like(tensors["h.0.mlp.c_fc.weight"], torch.nan)
    save_file(tensors, path, metadata={"format": "pt"})
    result = run_command("verify", folder, "--json")
    assert result.status == 1
    values = json.loads(result.out)
    failed = [check["part"] for check in values["checks"] if check["status"] == "fail"]
    assert values["failed"] == len(failed) and {"weights: finite numbers", "logits"} <= set(failed)


def test_a_folder_that_cannot_be_read_still_has_its_parts_checked(run_command: Callable, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights")
    result = run_command("verify", folder)
    assert result.status == 1 and "Traceback" not in result.err
    assert "the whole model" in result.out and "block, backward" in result.out


def test_random_and_unknown_models(run_command: Callable, tmp_path: Path) -> None:
    result = run_command("verify", tmp_path)
    assert result.status == 1 and not result.out and "is not a model: name a folder that contains" in result.err
    assert run_command("verify", "random").status == 0
    result = run_command("verify", "no-such-model")
    assert result.status == 1 and result.err.startswith("error: ")
