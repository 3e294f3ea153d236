"""Mangled files of other programs: the right model, or one line of a GPT2Error. A TensorFlow checkpoint has checksums."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from gpt2.formats.export import export_model
from gpt2.formats.registry import load_runnable
from gpt2.formats.stored import Stored
from gpt2.pretrained import load_foreign
from gpt2.weights.foreign import foreign_format, written_format
from gpt_config import GPT2Config
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model
from gpt_test.fuzz.mangling import mangled_bytes, mangled_json, outcome

TINY = GPT2Config(vocab_size=11, n_positions=6, n_embd=6, n_layer=1, n_head=3)

# Bytes that a reader of these small files may take beside what the process has: far less than sizes that a file invents.
_MORE_MEMORY = 1 << 30

HUNDREDS_OR_MORE = pytest.mark.parametrize("n_files", [80, pytest.param(1_000, marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Let an allocation of gigabytes fail, so that a reader that believes a file's sizes ends with a MemoryError."""
    resource = pytest.importorskip("resource", reason="this system has no limits of memory")
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("this system does not tell how much memory a process has")
    used = int(status.read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _MORE_MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@HUNDREDS_OR_MORE
@pytest.mark.parametrize("name", ["nanogpt", "llmc"])
def test_file(n_files: int, name: str, tmp_path: Path) -> None:
    """llm.c's files have no checksum: other weights cannot be noticed, so only the header is mangled."""
    model = random_model(dataclasses.replace(TINY, activation_function="gelu" if name == "nanogpt" else "gelu_new"))
    export_model(model, None, tmp_path / "whole", to=name)
    content, path, random = (tmp_path / "whole").read_bytes(), tmp_path / "mangled", Random(0)
    for number in range(n_files):
        path.write_bytes(mangled_bytes(content, random, end=40 if name == "llmc" else None))
        what = f"file {number}"
        outcome(lambda: foreign_format(path), what)
        loaded = outcome(lambda: load_foreign(path, name), what)
        if loaded is not None and name == "nanogpt":
            assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded[0].state_dict().items()), what
        assert loaded is None or loaded[0].config.n_embd == 6, what


@HUNDREDS_OR_MORE
def test_gguf(n_files: int, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """The format has no checksum. Weights are not mangled, because others cannot be noticed."""
    pytest.importorskip("gguf", reason="gguf is not installed (pip install '.[benchmark]')")
    model = random_model(dataclasses.replace(TINY, vocab_size=300, n_embd=32, n_head=2))
    for dtype in ("float16", "q8_0"):
        export_model(model, small_tokenizer, tmp_path / dtype, to="gguf", dtype=dtype)
    path, random = tmp_path / "mangled", Random(2)
    for number in range(n_files):
        content = (tmp_path / random.choice(("float16", "q8_0"))).read_bytes()
        if number % 4:
            content = mangled_bytes(content, random, end=random.choice((60, 2_000, 12_000)))
        else:
            content = with_strange_number(content, random)
        path.write_bytes(content)
        outcome(lambda: foreign_format(path), f"file {number}")
        loaded = outcome(lambda: load_foreign(path, "gguf"), f"file {number}")
        assert loaded is None or loaded[0].config.n_embd == 32, number


def with_strange_number(content: bytes, random: Random) -> bytes:
    """Replace a number after a key, or one in the description of a tensor, by a very large, a small or a negative one."""
    places = [content.index(name) + len(name) + 4 for name in (b"_count", b"_length", b".tokens", b".merges", b"epsilon")]
    places += [content.index(b"blk.0.attn_qkv.weight") + len("blk.0.attn_qkv.weight") + skip for skip in (0, 4, 12, 20, 24)]
    place = random.choice([*places, 8, 16])  # or the numbers of tensors and of keys
    number = random.choice((0, 1, 2, 3, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1))
    return content[:place] + number.to_bytes(8, "little") + content[place + 8 :]


@HUNDREDS_OR_MORE
def test_tensorflow_checkpoint(n_files: int, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """hparams.json alone has no checksum: numbers in it must fit the shapes, but for the number of heads."""
    model = random_model(dataclasses.replace(TINY, vocab_size=300))
    export_model(model, small_tokenizer, tmp_path / "whole", to="openai")
    folder, random = tmp_path / "mangled", Random(1)
    for number in range(n_files):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        changed = folder / random.choice(
            [
                "model.ckpt.index",
                "model.ckpt.index",
                "model.ckpt.data-00000-of-00001",
                "hparams.json",
                "checkpoint",
                "encoder.json",
                "vocab.bpe",
            ]
        )
        if changed.suffix == ".json":
            changed.write_bytes(mangled_json(json.loads(changed.read_text()), random).encode("utf-8", "replace"))
        else:
            changed.write_bytes(mangled_bytes(changed.read_bytes(), random))
        what = f"file {number}, {changed.name}"
        outcome(lambda: foreign_format(folder), what)
        loaded = outcome(lambda: load_foreign(folder, "openai"), what)
        if loaded is not None:
            found = loaded[0].state_dict()
            assert all(torch.equal(tensor, found[key]) for key, tensor in model.state_dict().items()), what


@HUNDREDS_OR_MORE
@pytest.mark.parametrize("name", ["onnx", "ctranslate2"])
def test_what_other_programs_run(n_files: int, name: str, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """The weights and the engine that `gpt2 verify` reads: no checksum, so that other weights cannot be noticed."""
    package = "onnxruntime" if name == "onnx" else name
    pytest.importorskip(package, reason=f"{package} is not installed (pip install -r requirements-dev.txt)")
    model = random_model(dataclasses.replace(TINY, vocab_size=300))
    for dtype in ("float32", "int8"):
        export_model(model, small_tokenizer, tmp_path / dtype, to=name, dtype=dtype)
    form, random, ids, folder = load_runnable(name), Random(3), torch.tensor([[1, 2, 3]]), tmp_path / "mangled"

    def run() -> list[Stored]:
        weights = form.stored_weights(folder)
        form.load_engine(folder).logits(ids)
        return weights

    for number in range(n_files):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / random.choice(("float32", "int8")), folder)
        file = next((folder / "onnx").iterdir()) if name == "onnx" else folder / "model.bin"
        content = file.read_bytes()
        file.write_bytes(mangled_bytes(content, random, end=random.choice((60, 1_000, len(content)))))
        outcome(lambda: written_format(folder), f"file {number}")
        outcome(run, f"file {number}")
