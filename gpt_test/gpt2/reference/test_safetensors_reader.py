"""The reader on files that the safetensors library wrote, and on damaged files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gpt2 import GPT2
from gpt2.reference.safetensors_reader import find_parameters, parameter_shapes, read_config, read_floats
from gpt2.weights.safetensors_header import read_header
from gpt_config import CheckpointError, GPT2Config
from gpt_test.conftest import random_model

TINY = GPT2Config(vocab_size=11, n_positions=6, n_embd=6, n_layer=2, n_head=3, n_inner=10)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    random_model(TINY).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_number_of_each_type_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    """All bit patterns of the two-byte types, including subnormal and infinite numbers."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = patterns.view(dtype) if dtype.itemsize == 2 else torch.randn(50, dtype=dtype) * 1e30
    save_file({"a": torch.ones(3), "values": values, "none": torch.ones(0)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    read = torch.tensor(read_floats(header["values"]), dtype=torch.float64)
    torch.testing.assert_close(read, values.double(), rtol=0, atol=0, equal_nan=True)
    assert header["a"].shape == (3,) and len(read_floats(header["none"])) == 0


def test_names_and_shapes_equal_those_of_the_model() -> None:
    model = GPT2(TINY)
    assert parameter_shapes(TINY) == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_prefixes_masks_and_the_head_are_removed(tiny_folder: Path) -> None:
    plain = {name: read_floats(tensor) for name, tensor in find_parameters(tiny_folder, TINY).items()}
    rewrite(
        tiny_folder,
        lambda tensors: (
            {f"_orig_mod.transformer.{name}": tensor for name, tensor in tensors.items()}
            | {"lm_head.weight": tensors["wte.weight"].clone(), "transformer.h.0.attn.bias": torch.ones(1, 1, 6, 6)}
        ),
    )
    found = find_parameters(tiny_folder, TINY)
    assert {name: read_floats(tensor) for name, tensor in found.items()} == plain


def test_a_head_without_an_embedding_is_used_as_the_embedding(tiny_folder: Path) -> None:
    rewrite(tiny_folder, lambda tensors: {name.replace("wte", "lm_head"): tensor for name, tensor in tensors.items()})
    assert "wte.weight" in find_parameters(tiny_folder, TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"lm_head.weight": t["wte.weight"] + 1}, "tied head"),
        (lambda t: t | {"transformer.wte.weight": t["wte.weight"].clone()}, "twice"),
        (lambda t: t | {"h.9.ln_1.bias": torch.ones(6)}, "h.9.ln_1.bias is unknown"),
        (lambda t: {name: tensor for name, tensor in t.items() if name != "ln_f.bias"}, "ln_f.bias is missing"),
        (lambda t: t | {"wpe.weight": torch.ones(7, 6)}, r"wpe.weight is \(7, 6\) instead of \(6, 6\)"),
        (lambda t: t | {"wpe.weight": torch.ones(6, 6, dtype=torch.int64)}, "wpe.weight is I64"),
    ],
)
def test_weights_of_another_model_are_refused(tiny_folder: Path, change, message: str) -> None:
    rewrite(tiny_folder, change)
    with pytest.raises(CheckpointError, match=message) as error:
        find_parameters(tiny_folder, TINY)
    assert "\n" not in str(error.value)


def test_shards_and_pickles_are_refused_with_the_remedy(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    sharded = tmp_path_factory.mktemp("sharded")
    weight_map = {}
    for number, name in enumerate(tensors):
        save_file({name: tensors[name]}, sharded / f"model-{number}.safetensors")
        weight_map[name] = f"model-{number}.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    legacy = tmp_path_factory.mktemp("legacy")
    torch.save(tensors, legacy / "pytorch_model.bin")
    empty = tmp_path_factory.mktemp("empty")
    for folder in (sharded, legacy, empty):
        with pytest.raises(CheckpointError, match=r"single model\.safetensors.*save_pretrained") as error:
            find_parameters(folder, TINY)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(empty)


@settings(max_examples=150)
@given(data=st.data())
def test_damage_is_a_checkpoint_error_or_undetectable(data, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The file is truncated, or one byte of its header is changed: CheckpointError, unless it is still a valid file."""
    source = tmp_path_factory.getbasetemp() / "whole" / "model.safetensors"
    if not source.exists():
        random_model(TINY).save_pretrained(source.parent)
    content = bytearray(source.read_bytes())
    n_header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, n_header - 1))] = data.draw(st.integers(0, 255))
    damaged = source.parent.parent / "damaged"
    damaged.mkdir(exist_ok=True)
    shutil.copy(source.parent / "config.json", damaged)
    (damaged / "model.safetensors").write_bytes(content)
    try:
        for tensor in find_parameters(damaged, TINY).values():
            read_floats(tensor)
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_the_error_names_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(len(b"[" * 90000).to_bytes(8, "little") + b"[" * 90000)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_header(tmp_path / "x.safetensors")
