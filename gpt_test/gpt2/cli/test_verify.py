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


def test_a_file_of_no_known_format_is_one_line(run_command: Callable, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"PK\x03\x04 half of a file")
    for arguments in ((), ("--against", folder)):
        result = run_command("verify", tmp_path / "ckpt.pt", *arguments)
        assert result.status == 1 and result.err.count("\n") == 1
        assert "ckpt.pt is no file that gpt2 import reads: it may be damaged" in result.err


def test_a_file_is_compared_with_a_folder(run_command: Callable, folder: Path, tmp_path: Path) -> None:
    run_command("export", folder, "--to", "llmc", "--out", tmp_path / "model.bin")
    result = run_command("verify", tmp_path / "model.bin", "--against", folder, "--json")
    assert (result.status, result.err) == (0, "")
    checks = {check["part"]: check["status"] for check in json.loads(result.out)["checks"]}
    assert checks == dict.fromkeys(("sizes", "weights", "logits", "greedy ids"), "pass")
    path = tmp_path / "model.bin"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")  # the last number of ln_f
    result = run_command("verify", path, "--against", folder)
    assert result.status == 1 and "ln_f.bias" in result.out and "2 fail" in result.out
    result = run_command("verify", "--against", folder)
    assert result.status == 2 and "--against compares MODEL with a folder: name MODEL too" in result.err


def test_a_file_is_verified_as_the_model_that_it_is(run_command: Callable, folder: Path, tmp_path: Path) -> None:
    run_command("export", folder, "--to", "openai", "--out", tmp_path / "tensorflow")
    result = run_command("verify", tmp_path / "tensorflow")
    assert result.status == 0 and "logits with a KV cache" in result.out and "tokenizer: fits the vocabulary" in result.out
    (tmp_path / "written" / "onnx").mkdir(parents=True)
    (tmp_path / "written" / "onnx" / "model.onnx").write_bytes(b"no graph")
    result = run_command("verify", tmp_path / "written")
    assert result.status == 1 and "is an ONNX model, which other programs run: name the model to compare" in result.err
    result = run_command("verify", tmp_path / "written", "--against", folder)
    assert result.status == 1 and "is not a readable ONNX model" in result.err and result.err.count("\n") == 1
