"""`gpt2 quantize`: a folder that other commands accept, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.finetuning.template import TEMPLATES, InstructionTemplate
from gpt2.quantization.quantize import dequantize
from gpt2.reference.numpy_model import NumpyGPT2
from gpt_config.errors import CheckpointError, InputError


def test_the_folder_is_a_model_like_others(run_command, small_folder: Path, tmp_path: Path) -> None:
    result = run_command("quantize", small_folder, "--out", tmp_path / "q")
    assert (result.status, result.out) == (0, "") and result.err == f"done: the int8 model is in {tmp_path / 'q'}\n"
    options = ["The cat", "--max_tokens", "5"]
    from_folder = run_command("generate", *options, "--from_pretrained", tmp_path / "q")
    assert from_folder.out == run_command("generate", *options, "--from_pretrained", small_folder, "--dtype", "int8").out


def test_mistakes_are_one_line(run_command, small_folder: Path, tmp_path: Path) -> None:
    for arguments, status, message in (
        (["quantize", small_folder, "--out", small_folder], 2, "already contains a model or an adapter"),
        (["quantize", small_folder, "--out", ""], 2, "--out is empty"),
        (["quantize", tmp_path / "none", "--out", tmp_path / "q"], 1, "none"),
    ):
        result = run_command(*arguments)
        assert result.status == status and message in result.err and len(result.err.splitlines()) == 1


def test_what_cannot_read_int8_refuses_it(run_command, small_folder: Path, tmp_path: Path) -> None:
    assert run_command("quantize", small_folder, "--out", tmp_path / "q").status == 0
    message = "contains int8 weights, but floats are needed: use the model before quantization, or convert it"
    result = run_command("verify", tmp_path / "q")
    assert (result.status, result.out) == (1, "") and message in result.err and len(result.err.splitlines()) == 1
    assert f"(gpt2 dequantize --out FOLDER {tmp_path / 'q'})" in result.err
    with pytest.raises(CheckpointError, match=message):
        NumpyGPT2.from_pretrained(tmp_path / "q")


def test_transformers_refuses_an_int8_folder(run_command, small_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert run_command("quantize", small_folder, "--out", tmp_path / "q").status == 0
    for name in ("AutoModelForCausalLM", "GPT2LMHeadModel", "GPT2Model"):
        with pytest.raises(ValueError, match=r"gpt2-int8|quant_method"):
            getattr(transformers, name).from_pretrained(tmp_path / "q")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_way_back_is_an_ordinary_folder(run_command, small_folder: Path, tmp_path: Path, dtype: str) -> None:
    """Its weights are weight_int8 * scale; transformers computes the same as this package."""
    transformers = pytest.importorskip("transformers")
    base, int8, out = tmp_path / "base", tmp_path / "q", tmp_path / "f"
    GPT2.from_pretrained(small_folder).save_pretrained(base)
    TEMPLATES["plain"].save(base)
    assert run_command("quantize", base, "--out", int8).status == 0
    result = run_command("dequantize", int8, "--out", out, "--dtype", dtype)
    assert (result.status, result.out, result.err) == (0, "", f"done: the model in {dtype} is in {out}\n")
    assert InstructionTemplate.load(out) == InstructionTemplate.load(int8) == TEMPLATES["plain"]
    stored, ours = GPT2.from_pretrained(int8).state_dict(), GPT2.from_pretrained(out, dtype=dtype)
    expected = (stored["h.0.attn.c_attn.weight_int8"].T * stored["h.0.attn.c_attn.scale"]).to(ours.dtype)
    assert torch.equal(ours.h[0].attn.c_attn.weight, expected)
    assert torch.equal(ours.wte.weight, (stored["wte.weight_int8"] * stored["wte.scale"][:, None]).to(ours.dtype))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == ours.dtype and all(
        torch.equal(a, theirs.transformer.state_dict()[n]) for n, a in ours.named_parameters()
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("The cat", return_tensors="pt").input_ids
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=2e-2 if dtype == "float16" else 1e-5, rtol=0)


def test_only_an_int8_model_can_be_converted_back(run_command, small_folder: Path, tmp_path: Path) -> None:
    result = run_command("dequantize", small_folder, "--out", tmp_path / "f")
    assert result.status == 1 and f"{small_folder} is not in int8: name a folder" in result.err
    with pytest.raises(InputError, match="not in int8"):
        dequantize(GPT2.from_pretrained(small_folder))
    with pytest.raises(InputError, match="the model is in int8, which has no other dtype"):
        GPT2.from_pretrained(small_folder, dtype="int8").save_pretrained(tmp_path / "f", dtype="float16")
    assert not (tmp_path / "f").exists()


def test_a_model_that_was_converted_back_can_learn(small_folder: Path) -> None:
    model = dequantize(GPT2.from_pretrained(small_folder, dtype="int8"))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters()) and len(list(model.parameters())) > 10
