"""save_pretrained: transformers loads the folder with the same logits and ids; a failed save leaves the old files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2 import GPT2
from gpt2.weights import writing as saving
from gpt2.weights.writing import n_bytes_of
from gpt_config import ConfigError, DeviceError, GPT2Config, InputError, WriteError
from gpt_encoder import CharTokenizer, GPT2Tokenizer, load_tokenizer
from gpt_test.conftest import TRAINING_TEXT, random_model
from gpt_test.gpt2.weights.room import room_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_saving_and_loading_keeps_every_bit(dtype: torch.dtype, small_config: GPT2Config, tmp_path: Path) -> None:
    model = random_model(small_config, dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path, dtype=str(dtype).removeprefix("torch."))
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("odd", [False, True])
def test_transformers_loads_it_with_identical_logits(odd: bool, small_tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 60, "n_head": 5, "n_positions": 37, "n_inner": 77} if odd else {"n_embd": 32, "n_head": 4}
    config = GPT2Config(vocab_size=300, n_layer=2, **sizes, scale_attn_by_inverse_layer_idx=odd)
    model = random_model(config, dtype=torch.float64)
    model.save_pretrained(tmp_path, tokenizer=small_tokenizer)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float64
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TRAINING_TEXT[:60], return_tensors="pt").input_ids[:, :30]
    assert torch.equal(ids, small_tokenizer.encode(TRAINING_TEXT[:60], return_tensors="pt")[:, :30])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-10, rtol=0)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.wte.weight, model.wte.weight)


def test_config_json_has_n_ctx_and_dtype(small_model: GPT2, tmp_path: Path) -> None:
    small_model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["n_ctx"], values["n_positions"], values["dtype"], values["model_type"]) == (40, 40, "float32", "gpt2")


def test_the_tokenizer_is_saved_too(small_folder: Path, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    GPT2.from_pretrained(small_folder).save_pretrained(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode(TRAINING_TEXT) == small_tokenizer.encode(TRAINING_TEXT)
    new = GPT2(GPT2Config(n_embd=4, n_layer=1, n_head=1))
    new.save_pretrained(tmp_path / "new")
    assert load_tokenizer(tmp_path / "new").encode("Hello world") == [15496, 995]
    characters = CharTokenizer.from_texts("abc")
    small = GPT2(GPT2Config(vocab_size=characters.vocab_size, n_embd=4, n_layer=1, n_head=1))
    small.save_pretrained(tmp_path / "char", tokenizer=characters)
    assert isinstance(load_tokenizer(tmp_path / "char"), CharTokenizer)
    small.save_pretrained(tmp_path / "none")
    assert {path.name for path in (tmp_path / "none").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_a_model_can_be_saved_over_the_folder_it_was_loaded_from(small_folder, small_model, tmp_path: Path) -> None:
    """Its parameters are views of the file that is overwritten."""
    small_model.save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), small_model.parameters(), strict=True))
    again = GPT2.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small_model.parameters(), strict=True))


def test_a_failed_save_leaves_the_old_files(small_model: GPT2, tmp_path: Path, monkeypatch) -> None:
    small_model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        random_model(small_model.config, seed=9).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_does_not_fit_on_the_disk_is_named(small_model: GPT2, tmp_path: Path) -> None:
    with room_for(20_000), pytest.raises(WriteError, match=r"cannot write .*model\.safetensors.*free disk space"):
        small_model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("max_shard_size", ["50GB", 5000, "20KB"])
def test_dtype_and_shards_are_as_asked_for(small_model: GPT2, tmp_path: Path, dtype: str, max_shard_size: int | str) -> None:
    """transformers reads the same numbers. No file is larger than asked for, unless it contains a single tensor."""
    transformers = pytest.importorskip("transformers")
    small_model.save_pretrained(tmp_path / "ours", dtype=dtype, max_shard_size=max_shard_size)
    assert small_model.dtype == torch.float32
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in small_model.state_dict().items()}
    loaded = GPT2.from_pretrained(tmp_path / "ours", dtype=dtype).state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.dtype == getattr(torch, dtype)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor) and torch.equal(theirs.transformer.state_dict()[name], tensor)
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    if max_shard_size == "50GB":
        assert files == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for file in files:
        tensors = load_file(tmp_path / "ours" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(tensors)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= n_bytes_of(max_shard_size)


def test_other_weights_are_replaced_as_a_whole(small_model: GPT2, tmp_path: Path) -> None:
    small_model.save_pretrained(tmp_path, max_shard_size=5000)
    (tmp_path / "notes.txt").write_text("mine")
    other = random_model(small_model.config, seed=9)
    for size in ("50GB", 9000, 4000):
        other.save_pretrained(tmp_path, max_shard_size=size)
        assert torch.equal(GPT2.from_pretrained(tmp_path).wte.weight, other.wte.weight)
    n_shards = len(set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()))
    assert len(list(tmp_path.glob("model*.safetensors"))) == n_shards and (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize(
    "size", ["", "5", 1, "1.5 GB", "2kb", "3MB", "0.0000001KB", "-1GB", 0, -3, None, True, 1.5, "5MiB", "GB"]
)
def test_sizes(size: object) -> None:
    known = {"5": 5, 1: 1, "1.5 GB": 1_500_000_000, "2kb": 2000, "3MB": 3_000_000}
    if size in known and size is not True:
        assert n_bytes_of(size) == known[size]  # type: ignore[arg-type]
    else:
        with pytest.raises(ConfigError, match=r"max_shard_size=.* is not a size"):
            n_bytes_of(size)  # type: ignore[arg-type]


def test_what_cannot_be_saved_leaves_the_old_files(small_model: GPT2, tmp_path: Path) -> None:
    small_model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    large = random_model(small_model.config)
    with torch.no_grad():
        large.h[1].mlp.c_fc.weight[0, 0] = 70_000
    with pytest.raises(
        InputError, match=r"h\.1\.mlp\.c_fc\.weight has numbers up to 7e\+04, and float16 ends at 6\.55e\+04"
    ):
        large.save_pretrained(tmp_path, dtype="float16")
    with pytest.raises(DeviceError, match="dtype 'int4' is unknown"):
        large.save_pretrained(tmp_path, dtype="int4")
    with pytest.raises(ConfigError, match="max_shard_size='big' is not a size"):
        large.save_pretrained(tmp_path, max_shard_size="big")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    large.save_pretrained(tmp_path, dtype="bfloat16")


def test_an_adapters_folder_takes_no_model(small_model: GPT2, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(WriteError, match="contains an adapter: write the model into another folder"):
        small_model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
