"""Mangled weights and configs: the right model, or one line of a GPT2Error, and the same verdict of all engines."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import GPT2
from gpt2.reference.numpy_model import NumpyGPT2
from gpt2.reference.safetensors_reader import find_parameters, read_config, read_floats
from gpt_config import CheckpointError, GPT2Config, GPT2Error
from gpt_test.conftest import random_model
from gpt_test.fuzz.mangling import FEW_OR_MANY, mangled_bytes, mangled_json, outcome

TINY = GPT2Config(vocab_size=11, n_positions=6, n_embd=6, n_layer=2, n_head=3, n_inner=10)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def tiny() -> GPT2:
    return random_model(TINY)


@pytest.fixture
def folder(tiny: GPT2, tmp_path: Path) -> Path:
    tiny.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def is_the_model(loaded: GPT2, model: GPT2) -> bool:
    expected, found = model.state_dict(), loaded.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def read_by_reference(folder: Path) -> dict[str, np.ndarray]:
    tensors = find_parameters(folder, read_config(folder))
    return {name: np.asarray(read_floats(tensor)).reshape(tensor.shape) for name, tensor in tensors.items()}


def verdicts(folder: Path, what: str = "") -> bool:
    """Whether all three engines read the folder. They must agree on that, and on each number."""
    by_torch = outcome(lambda: GPT2.from_pretrained(folder), what)
    by_numpy = outcome(lambda: NumpyGPT2.from_pretrained(folder), what)
    by_reference = outcome(lambda: read_by_reference(folder), what)
    assert (by_torch is None, by_numpy is None) == (by_reference is None,) * 2, what
    if by_torch is None:
        return False
    for name, tensor in by_torch.state_dict().items():
        for other in (by_numpy.parameters[name], by_reference[name]):
            np.testing.assert_array_equal(tensor.numpy(), other, err_msg=what)
    return True


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    n_header = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + n_header]), content[8 + n_header :]


def joined(header: str, data: bytes) -> bytes:
    return struct.pack("<Q", len(header.encode("utf-8", "replace"))) + header.encode("utf-8", "replace") + data


def a_name_twice(header: dict[str, Any], data: bytes) -> bytes:
    first, second = list(header)[1:3]
    text = json.dumps(header)
    return joined(text[:-1] + f", {json.dumps(first)}: {json.dumps(header[first])}}}", data) if second else b""


def an_overlap(header: dict[str, Any], data: bytes) -> bytes:
    names = [name for name in header if name.endswith("ln_1.bias")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    return joined(json.dumps(header), data)


def a_hole(header: dict[str, Any], data: bytes) -> bytes:
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    header[last]["data_offsets"] = [offset + 4 for offset in header[last]["data_offsets"]]
    return joined(json.dumps(header), data + b"\x00" * 4)


def bytes_after_the_last(header: dict[str, Any], data: bytes) -> bytes:
    return joined(json.dumps(header), data + b"\x00" * 4)


def bytes_before_the_first(header: dict[str, Any], data: bytes) -> bytes:
    for name in header.keys() - {"__metadata__"}:
        header[name]["data_offsets"] = [offset + 4 for offset in header[name]["data_offsets"]]
    return joined(json.dumps(header), b"\x00" * 4 + data)


def a_key_of_an_entry_twice(header: dict[str, Any], data: bytes) -> bytes:
    return joined(json.dumps(header).replace('"dtype":', '"dtype": "F64", "dtype":', 1), data)


def levels(header: dict[str, Any], data: bytes) -> bytes:
    return joined('{"a":' * 100_000 + "1" + "}" * 100_000, data)


@pytest.mark.parametrize(
    ("mangle", "message"),
    [
        (a_name_twice, "twice"), (an_overlap, "overlaps another tensor"), (a_hole, "begins 4 bytes after"),
        (bytes_after_the_last, "4 bytes follow the last tensor"), (bytes_before_the_first, "begins 4 bytes after"),
        (a_key_of_an_entry_twice, "twice"), (levels, "more than 100 levels"),
    ],
)  # fmt: skip
def test_a_layout_that_readers_could_read_differently_is_refused_by_all(
    mangle: Callable[[dict[str, Any], bytes], bytes], message: str, folder: Path
) -> None:
    assert verdicts(folder)
    path = folder / WEIGHTS
    path.write_bytes(mangle(*split(path.read_bytes())))
    for read in (GPT2.from_pretrained, NumpyGPT2.from_pretrained, read_by_reference):
        with pytest.raises(CheckpointError, match=message):
            read(folder)


@FEW_OR_MANY
def test_safetensors(n_files: int, folder: Path, tiny: GPT2) -> None:
    path, random = folder / WEIGHTS, Random(0)
    content = path.read_bytes()
    header, data = split(content)
    n_read = 0
    for number in range(n_files):
        if random.random() < 0.5:
            mangled = mangled_bytes(content, random, end=len(content) - len(data))
        else:
            mangled = joined(mangled_json(header, random), data)
        path.write_bytes(mangled)
        n_read += verdicts(folder, f"file {number}: {mangled[:200]!r}")
    assert n_read < n_files / 2


@FEW_OR_MANY
def test_config(n_files: int, folder: Path, tiny: GPT2) -> None:
    path, random = folder / "config.json", Random(1)
    values = json.loads(path.read_text())
    for number in range(n_files):
        text = mangled_json(values, random)
        path.write_bytes(text.encode("utf-8", "replace"))
        loaded = outcome(lambda: GPT2.from_pretrained(folder), f"file {number}: {text[:1000]!r}")
        if loaded is not None:
            assert is_the_model(loaded, tiny), text
            found = json.loads(path.read_bytes())
            for field in ("n_head", "layer_norm_epsilon", "activation_function", "scale_attn_weights"):  # not in the shapes
                assert getattr(loaded.config, field) == found.get(field, getattr(GPT2Config(), field)), text


@pytest.mark.parametrize("field", ["n_layer", "n_embd", "n_inner", "vocab_size", "n_positions"])
def test_a_config_of_a_huge_model_is_refused_at_once(field: str, folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values |= {field: 1_000_000 * (3 if field == "n_embd" else 1)} | ({"n_ctx": 1_000_000} if field == "n_positions" else {})
    (folder / "config.json").write_text(json.dumps(values))
    for read in (GPT2.from_pretrained, NumpyGPT2.from_pretrained, read_by_reference):
        assert outcome(lambda read=read: read(folder)) is None


@FEW_OR_MANY
def test_shard_index(n_files: int, folder: Path, tiny: GPT2) -> None:
    tensors = load_file(folder / WEIGHTS)
    weight_map = {name: f"model-0000{1 + len(name) % 3}-of-00003.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / WEIGHTS).unlink()
    random = Random(2)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    for number in range(n_files):
        text = mangled_json(index, random)
        (folder / f"{WEIGHTS}.index.json").write_bytes(text.encode("utf-8", "replace"))
        loaded = outcome(lambda: GPT2.from_pretrained(folder), f"file {number}: {text[:1000]!r}")
        assert loaded is None or is_the_model(loaded, tiny), text


@FEW_OR_MANY
@pytest.mark.filterwarnings("ignore")
def test_bin(n_files: int, folder: Path, tiny: GPT2) -> None:
    """torch.load itself does not compare checksums: it reads other numbers."""
    torch.save(tiny.state_dict(), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    path, random = folder / "pytorch_model.bin", Random(3)
    content = path.read_bytes()
    for number in range(n_files):
        path.write_bytes(mangled_bytes(content, random))
        loaded = outcome(lambda: GPT2.from_pretrained(folder), f"file {number}")
        assert loaded is None or is_the_model(loaded, tiny), number


class Runs:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("how", ["torch", "torch before 2020", "pickle", "zip"])
def test_code_in_a_pickle_never_runs(how: str, folder: Path, tiny: GPT2, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    mark, path = tmp_path / "it-ran", folder / "pytorch_model.bin"
    for function, args in (
        (os.mkdir, (str(mark),)),
        (eval, (f"open({str(mark)!r}, 'w')",)),
        (os.system, (f"touch {mark}",)),
    ):
        content = {**tiny.state_dict(), "wte.weight": Runs(function, *args)}
        if how == "pickle":
            path.write_bytes(pickle.dumps(content["wte.weight"]))
        elif how == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", pickle.dumps({"wte.weight": content["wte.weight"]}, 2))
                archive.writestr("archive/version", "3\n")
        else:
            torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
        with pytest.raises(CheckpointError, match="never unpickled"):
            GPT2.from_pretrained(folder)
        assert not mark.exists()


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to("meta"), "meta"), (lambda t: t.to_sparse(), "sparse"), (lambda t: t.to_sparse_csr(), "sparse"),
        (quantized, "quantized"), (lambda t: t[:1, :1].clone().expand(1000, 1000), "larger"),
    ],
)  # fmt: skip
def test_tensors_without_ordinary_numbers_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, folder: Path, tiny: GPT2
) -> None:
    (folder / WEIGHTS).unlink()
    state = tiny.state_dict()
    torch.save(state | {"wpe.weight": change(state["wpe.weight"])}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        GPT2.from_pretrained(folder)
    assert str(caught.value).isprintable()


def test_a_compressed_archive_is_refused(folder: Path, tiny: GPT2) -> None:
    torch.save(tiny.state_dict(), folder / "stored.bin")
    (folder / WEIGHTS).unlink()
    with (
        zipfile.ZipFile(folder / "stored.bin") as stored,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        GPT2.from_pretrained(folder)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("put", [pipe, Path.mkdir, device], ids=["pipe", "folder", "device"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", WEIGHTS, "pytorch_model.bin", f"{WEIGHTS}.index.json",
             "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"],
)  # fmt: skip
def test_what_is_no_regular_file_is_refused_without_waiting(
    put: Callable[[Path], None], name: str, small_folder: Path, tmp_path: Path
) -> None:
    from gpt_encoder import load_tokenizer

    folder = Path(shutil.copytree(small_folder, tmp_path / "model"))
    if (folder / name).exists():
        (folder / name).unlink()
    if name == "pytorch_model.bin":
        (folder / WEIGHTS).unlink()
    put(folder / name)
    is_of_model = name in ("config.json", "generation_config.json", WEIGHTS, "pytorch_model.bin", f"{WEIGHTS}.index.json")
    with pytest.raises(GPT2Error, match="not a regular file"):
        GPT2.from_pretrained(folder) if is_of_model else load_tokenizer(folder)
