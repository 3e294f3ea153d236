"""Weights: every layout of GPT-2 checkpoints loads and gives the same logits; damaged files give one clear error."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import GPT2
from gpt2.quantization.quantize import quantize_int8
from gpt_config import CheckpointError, DeviceError, GPT2Config, GPT2Error, ModelNotFoundError
from gpt_test.conftest import random_model, transformers_twin

IDS = torch.tensor([[1, 5, 2, 7]])


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_folder, tmp_path / "model"))


def assert_same_model(folder: Path, model: GPT2) -> None:
    loaded = GPT2.from_pretrained(folder)
    assert not loaded.training and loaded.config == model.config
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(IDS), model(IDS))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    # Copies, because the file will be overwritten, and the tensors are views of it.
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(tensors_of(folder)), folder / "model.safetensors", metadata={"format": "pt"})


def renamed(prefix: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def with_masks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40).tril() for i in range(2)}
    return tensors | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}


def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"transformer.{name}": tensor for name, tensor in tensors.items()} | {
        "lm_head.weight": tensors["wte.weight"].clone()
    }


def head_only(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = with_head(tensors)
    del named["transformer.wte.weight"]
    return named


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors, renamed("transformer."), renamed("_orig_mod."), renamed("module."),
        renamed("module._orig_mod.transformer."), with_masks, with_head, head_only,
    ],
    ids=["published", "transformer", "compiled", "ddp", "all prefixes", "saved masks", "duplicate head", "head only"],
)  # fmt: skip
def test_every_naming_loads(change, folder: Path, small_model: GPT2) -> None:
    rewrite(folder, change)
    assert_same_model(folder, small_model)


def to_pickle(folder: Path, **options: object) -> None:
    torch.save(tensors_of(folder), folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


def to_shards(folder: Path, write: Callable[[dict, Path], object], suffix: str) -> None:
    tensors, weight_map = tensors_of(folder), {}
    names = sorted(tensors)
    for number, part in enumerate((names[:5], names[5:9], names[9:]), start=1):
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        file = f"{stem}-{number:05}-of-00003.{suffix}"
        write({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "convert",
    [
        to_pickle,
        lambda folder: to_pickle(folder, _use_new_zipfile_serialization=False),
        lambda folder: to_shards(folder, save_file, "safetensors"),
        lambda folder: to_shards(folder, torch.save, "bin"),
    ],
    ids=["pytorch_model.bin", "bin from before 2020", "sharded safetensors", "sharded bin"],
)
def test_every_format_loads(convert, folder: Path, small_model: GPT2) -> None:
    convert(folder)
    assert_same_model(folder, small_model)


def test_transformers_folders_load(small_model: GPT2, tmp_path: Path) -> None:
    twin = transformers_twin(small_model)
    for number, options in enumerate(({}, {"max_shard_size": "40KB"})):
        twin.save_pretrained(tmp_path / str(number), **options)
        assert_same_model(tmp_path / str(number), small_model)
    twin.transformer.save_pretrained(tmp_path / "base")
    assert_same_model(tmp_path / "base", small_model)
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 1


def test_openais_hparams_replace_the_config(folder: Path, small_model: GPT2) -> None:
    (folder / "config.json").unlink()
    hparams = {"n_vocab": 300, "n_ctx": 40, "n_embd": 24, "n_head": 3, "n_layer": 2}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    assert torch.equal(GPT2.from_pretrained(folder)(IDS), small_model(IDS))


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", torch.bfloat16), ("fp16", torch.float16), ("float64", torch.float64)]
)
def test_dtypes_convert(name: str, dtype: torch.dtype, folder: Path, small_model: GPT2) -> None:
    loaded = GPT2.from_pretrained(folder, dtype=name)
    assert all(torch.equal(p, q.to(dtype)) for p, q in zip(loaded.parameters(), small_model.parameters(), strict=True))
    loaded.save_pretrained(folder)
    again = GPT2.from_pretrained(folder, dtype=name)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), again.parameters(), strict=True))


def edit(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Return a function that damages the tensors in the named way."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if name == "missing":
            del tensors["h.1.mlp.c_fc.bias"], tensors["ln_f.weight"]
        elif name == "extra":
            tensors["h.2.ln_1.weight"] = torch.ones(24)
        elif name == "transposed":
            tensors["h.0.attn.c_attn.weight"] = tensors["h.0.attn.c_attn.weight"].t().contiguous()
        elif name == "integer":
            tensors["ln_f.bias"] = torch.ones(24, dtype=torch.int64)
        elif name == "untied":
            tensors["lm_head.weight"] = tensors["wte.weight"] + 1
        elif name == "twice":
            tensors["transformer.wpe.weight"] = tensors["wpe.weight"].clone()
        return tensors

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "missing h.1.mlp.c_fc.bias, ln_f.weight"),
        ("extra", "unknown h.2.ln_1.weight"),
        ("transposed", r"h.0.attn.c_attn.weight is \(72, 24\) instead of \(24, 72\)"),
        ("integer", "ln_f.bias is torch.int64"),
        ("untied", "lm_head.weight that differs from wte.weight"),
        ("twice", "contains 'wpe.weight' twice"),
    ],
)
def test_tensors_that_do_not_fit_are_named(damage: str, message: str, folder: Path) -> None:
    rewrite(folder, edit(damage))
    with pytest.raises(CheckpointError, match=message) as caught:
        GPT2.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


class _Payload:
    """An object that an attacker would put into a pickle: it runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["GPT2_TEST_PAYLOAD"],)


def plant_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": _Payload()}, protocol=2))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def unlink_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def index_of(weight_map: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        unlink_weights(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors is not a readable safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a readable safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 99), "not a readable safetensors file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (unlink_weights, "has no weights"),
        (index_of({"a": "model-00001-of-00002.safetensors"}), "which is missing"),
        (index_of({"a": "../model.safetensors"}), "not a file in the same folder"),
        (index_of([1]), "not a readable index"),
        (index_of({"a": "x" * 5000}), "which is missing"),
        (plant_code, "pytorch_model.bin is not a readable file of tensors"),
    ],
)
def test_damaged_folders_are_named(damage, message: str, folder: Path, tmp_path: Path, monkeypatch) -> None:
    payload = tmp_path / "the payload ran"
    monkeypatch.setenv("GPT2_TEST_PAYLOAD", str(payload))
    damage(folder)
    with pytest.raises(GPT2Error, match=message) as caught:
        GPT2.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert not payload.exists()


def test_a_pickle_of_something_else_is_refused(folder: Path) -> None:
    unlink_weights(folder)
    torch.save({"model": {"wte.weight": torch.ones(2)}, "step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not contain a state dict"):
        GPT2.from_pretrained(folder)
    torch.save({1: torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not contain a state dict"):
        GPT2.from_pretrained(folder)


def test_a_damaged_pickle_is_never_a_traceback(folder: Path) -> None:
    """With random bytes changed, the file loads or raises one of this package's errors."""
    generator = random.Random(0)
    for legacy in (True, False):
        to_pickle(shutil.copytree(folder, folder.parent / str(legacy)), _use_new_zipfile_serialization=not legacy)
        path = folder.parent / str(legacy) / "pytorch_model.bin"
        whole = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(whole)
            for _ in range(3):
                damaged[generator.randrange(min(len(damaged), 3000))] = generator.randrange(256)
            path.write_bytes(damaged)
            with contextlib.suppress(GPT2Error):
                GPT2.from_pretrained(path.parent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device 'gpu' is unknown: this machine has cpu"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown: use one of float32"),
        ({"dtype": torch.int8}, "unknown"),
    ],
)
def test_unknown_devices_and_dtypes_are_named(options: dict, message: str, folder: Path) -> None:
    with pytest.raises(DeviceError, match=message):
        GPT2.from_pretrained(folder, **options)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is a file"):
        GPT2.from_pretrained(folder / "model.safetensors")


def test_weights_are_views_of_the_file(folder: Path) -> None:
    """Loading copies nothing: the parameters are in the memory mapping of model.safetensors."""
    model = GPT2.from_pretrained(folder)
    address = model.wte.weight.data_ptr()
    assert any(low <= address < high for low, high in mappings_of(folder / "model.safetensors"))


def test_in_int8_the_file_is_not_kept_mapped(folder: Path) -> None:
    """A bias that is a view of the file would keep four times the memory of the int8 weights."""
    model = GPT2.from_pretrained(folder, dtype="int8")
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 4)
    assert not mappings_of(folder / "model.safetensors")


def mappings_of(path: Path) -> list[tuple[int, int]]:
    """Return the address ranges at which this process has mapped the file."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system has no /proc/self/maps")
    ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(path) in line]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


@pytest.mark.slow
def test_peak_memory_of_gpt2_xl(tmp_path: Path) -> None:
    """With random weights of 6.2 GB, loading and generating two tokens need at most 1.15 times that memory."""
    if shutil.disk_usage(tmp_path).free < 8 << 30:
        pytest.skip("needs 8 GB of disk")
    code = "import sys, torch; from gpt2 import GPT2; from gpt_config import GPT2Config; " \
           "GPT2(GPT2Config.preset('gpt2-xl')).save_pretrained(sys.argv[1])"  # fmt: skip
    subprocess.run([sys.executable, "-c", code, tmp_path / "xl"], check=True, cwd=Path(__file__).parents[3])
    weights = (tmp_path / "xl" / "model.safetensors").stat().st_size
    code = "import sys, torch; from gpt2 import GPT2; model = GPT2.from_pretrained(sys.argv[1]); " \
           "model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)"  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    reader = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); " \
             "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", reader, sys.executable, "-c", code, str(tmp_path / "xl")],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    peak = 1024 * int(result.stdout)
    print(f"weights {weights / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, ratio {peak / weights:.3f} ({before=})")
    assert weights < peak < 1.15 * weights


def test_construction_on_meta_takes_no_memory() -> None:
    with torch.device("meta"):
        model = GPT2(GPT2Config.preset("gpt2-xl"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert random_model(GPT2Config(vocab_size=5, n_embd=4, n_layer=1, n_head=1)).pretrained_from is None


def test_loading_does_not_import_torchs_compiler(small_model: GPT2, small_folder: Path, tmp_path: Path) -> None:
    """Importing torch._dynamo, which imports sympy, takes longer than everything else before the first token."""
    copy = GPT2(small_model.config)
    copy.load_state_dict(small_model.state_dict())
    quantize_int8(copy).save_pretrained(tmp_path / "int8")
    code = """import sys; from gpt2 import GPT2
for folder in sys.argv[1:]: GPT2.from_pretrained(folder)
print(sys.modules.keys() & {"torch._dynamo", "sympy"})"""
    done = subprocess.run(
        [sys.executable, "-c", code, small_folder, tmp_path / "int8"],
        check=True, cwd=Path(__file__).parents[3], capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "set()\n"
