"""A writer of a model folder that is killed leaves the old files, the new ones, or a folder that every reader refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from gpt2 import GPT2
from gpt2.adapters import files as adapter_files
from gpt2.adapters.files import read_adapter, save_adapter
from gpt2.adapters.lora import add_lora
from gpt2.cli.group import load_command
from gpt2.finetuning.classifier import GPT2Classifier
from gpt2.finetuning.classifier_files import load_classifier, save_classifier
from gpt2.finetuning.template import TEMPLATES
from gpt2.reference import numpy_model, python_gpt2
from gpt2.reference.numpy_model import NumpyGPT2
from gpt_config import GPT2Config, GPT2Error, LoRAConfig
from gpt_encoder import CharTokenizer, GPT2Tokenizer, load_tokenizer, train_bpe
from gpt_test.conftest import TRAINING_TEXT, random_model
from gpt_test.gpt2.weights.killing import run_and_kill

# For every function that reads a folder. Which of them a folder of that kind is for does not matter: it must be refused.
READERS: list[Callable[[Path], object]] = [
    GPT2.from_pretrained, NumpyGPT2.from_pretrained, python_gpt2.load_model, GPT2Config.from_folder, load_tokenizer,
    GPT2Tokenizer.from_pretrained, load_classifier, read_adapter,
]  # fmt: skip

# Some of each writer's operations, for a quick test. Most differ in nothing that a reader can see.
SOME = (0, 7, 30, 1_000_000)


class Writer(NamedTuple):
    """`old` makes the folder that is there before; `new` writes into it, and is killed."""

    old: Callable[[Path], object]
    new: Callable[[Path], object]


def _model(seed: int, activation: str, vocab_size: int = 300) -> GPT2:
    sizes = {"n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return random_model(GPT2Config(vocab_size=vocab_size, activation_function=activation, **sizes), seed)


def _writers(tmp: Path) -> dict[str, Writer]:
    """Writers by name. All models and tokenizers have the same sizes, so a mixture of two would load."""
    one, two = _model(1, "gelu_new"), _model(2, "relu")
    tokens, other = train_bpe([TRAINING_TEXT], vocab_size=300), train_bpe([TRAINING_TEXT[::-1]], vocab_size=300)
    letters, others = (CharTokenizer.from_texts(text) for text in ("abcd", "efgh"))
    base, int8, adapter = tmp / "base", tmp / "int8", tmp / "adapter"
    one.save_pretrained(base, tokenizer=tokens)
    torch.manual_seed(0)
    classifiers = [GPT2Classifier(model, labels) for model, labels in ((one, ["a", "b"]), (two, ["b", "c"]))]
    adapted = [GPT2.from_pretrained(base) for _ in range(2)]
    for rank, model in enumerate(adapted, start=1):
        add_lora(model, LoRAConfig(rank=rank))
    save_adapter(adapted[0], adapter, base_model=base)
    TEMPLATES["plain"].save(adapter)
    call("quantize", base, int8)

    def adapter_of(number: int, tokenizer: GPT2Tokenizer) -> Callable[[Path], None]:
        return lambda folder: save_adapter(adapted[number], folder, base_model=base, tokenizer=tokenizer)

    def head_of(number: int) -> Callable[[Path], None]:
        classifier = GPT2Classifier(adapted[number], ["a", "b"][:: 1 - 2 * number])
        return lambda folder: save_classifier(classifier, folder, tokens, base_model=str(base))

    def numpy_of(seed: int, tokenizer: GPT2Tokenizer) -> Callable[[Path], None]:
        model = NumpyGPT2(one.config, seed=seed)
        return lambda folder: model.save_pretrained(folder, tokenizer=tokenizer)

    def with_template(folder: Path) -> None:
        one.save_pretrained(folder, tokenizer=tokens)
        TEMPLATES["plain"].save(folder)

    return {
        "model": Writer(
            lambda f: one.save_pretrained(f, tokenizer=tokens), lambda f: two.save_pretrained(f, tokenizer=other)
        ),
        "shards": Writer(
            lambda f: one.save_pretrained(f, tokenizer=tokens, max_shard_size=3000),
            lambda f: two.save_pretrained(f, tokenizer=other, max_shard_size=5000, dtype="float16"),
        ),
        "classifier": Writer(
            lambda f: save_classifier(classifiers[0], f, tokens), lambda f: save_classifier(classifiers[1], f, other)
        ),
        "model over classifier": Writer(
            lambda f: save_classifier(classifiers[0], f, tokens), lambda f: two.save_pretrained(f, tokenizer=other)
        ),
        "adapter": Writer(adapter_of(0, tokens), adapter_of(1, other)),
        "adapter of a classifier": Writer(head_of(0), head_of(1)),
        "numpy": Writer(numpy_of(1, tokens), numpy_of(2, other)),
        "tokenizer": Writer(tokens.save_pretrained, other.save_pretrained),
        "characters over tokens": Writer(tokens.save_pretrained, letters.save_pretrained),
        "tokenizer in a model": Writer(lambda f: one.save_pretrained(f, tokenizer=tokens), other.save_pretrained),
        "characters": Writer(others.save_pretrained, letters.save_pretrained),
        "template": Writer(with_template, TEMPLATES["default"].save),
        "gpt2 quantize": Writer(Path.mkdir, lambda f: call("quantize", base, f)),
        "gpt2 dequantize": Writer(Path.mkdir, lambda f: call("dequantize", int8, f)),
        "gpt2 merge": Writer(Path.mkdir, lambda f: call("merge", adapter, f)),
    }  # fmt: skip


NAMES = [
    "model", "shards", "classifier", "model over classifier", "adapter", "adapter of a classifier", "numpy", "tokenizer",
    "characters over tokens", "tokenizer in a model", "characters", "template", "gpt2 quantize", "gpt2 dequantize",
    "gpt2 merge",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked process has no other threads than the one that forked it."""
    monkeypatch.setenv("GPT2_THREADS", "1")


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Writer]:
    return _writers(tmp_path_factory.mktemp("writers"))


def call(command: str, source: Path, out: Path) -> None:
    load_command(command).main([str(source), "--out", str(out)], standalone_mode=False)


def files_of(folder: Path) -> dict[str, bytes]:
    """The files that a reader of a model folder sees."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Killing:
    """Kills one writer at given operations, and checks what is left."""

    def __init__(self, writer: Writer, tmp: Path) -> None:
        self.writer, self.folder = writer, tmp / "killed"
        self.old_folder = tmp / "old"
        writer.old(self.old_folder)
        shutil.copytree(self.old_folder, tmp / "new")
        writer.new(tmp / "new")
        self.old, self.new = files_of(self.old_folder), files_of(tmp / "new")
        assert self.old != self.new
        self.n_killed = self.n_unfinished = 0

    def kill_after(self, n_operations: int) -> bool:
        """Kill the writer after this number of operations. Returns whether it had that many."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.old_folder, self.folder)
        if not run_and_kill(lambda: self.writer.new(self.folder), n_operations):
            assert files_of(self.folder) == self.new and all(path.is_file() for path in self.folder.iterdir())
            return False
        self.n_killed += 1
        left = files_of(self.folder)
        if left not in (self.old, self.new) or (self.folder / ".gpt2-moving").exists():
            self.n_unfinished += 1
            self.check_refused(left)
        self.check_next_run(is_whole=left == self.new)
        return True

    def check_refused(self, left: dict[str, bytes]) -> None:
        for read in READERS:
            with pytest.raises(GPT2Error, match="is not whole: the program that writes it") as caught:
                read(self.folder)
            assert len(str(caught.value).splitlines()) == 1
        # Other programs, which do not know the mark, never see a file of each.
        kept = [{name for name in left if files.get(name) == left[name]} for files in (self.old, self.new)]
        assert set(left) in kept

    def check_next_run(self, is_whole: bool) -> None:
        """The same command again completes the folder and leaves nothing else. A command does not overwrite a whole one."""
        is_command = not self.old
        if not (is_command and is_whole and not (self.folder / ".gpt2-moving").exists()):
            self.writer.new(self.folder)
        assert files_of(self.folder) == self.new and all(path.is_file() for path in self.folder.iterdir())


@pytest.mark.parametrize("name", ["model", "classifier", "adapter", "tokenizer", "gpt2 merge"])
def test_a_killed_writer_leaves_the_old_or_the_new_folder(name: str, writers: dict[str, Writer], tmp_path: Path) -> None:
    killing = Killing(writers[name], tmp_path)
    for n_operations in SOME:
        killing.kill_after(n_operations)
    assert killing.n_killed


def test_between_the_old_and_the_new_files_every_reader_refuses_the_folder(writers, tmp_path: Path) -> None:
    """The last operations: files are removed and moved."""
    killing = Killing(writers["model"], tmp_path)
    n_operations = 0
    while killing.kill_after(n_operations):
        n_operations += 24
    for number in range(n_operations - 24, n_operations, 2):
        killing.kill_after(number)
    assert killing.n_unfinished > 3


@pytest.mark.parametrize(
    ("module", "name", "read"),
    [
        (numpy_model, "find_parameters", NumpyGPT2.from_pretrained),
        (python_gpt2, "find_parameters", python_gpt2.load_model),
        (adapter_files, "adapter_file", read_adapter),
    ],
)
def test_a_writer_between_two_files_that_are_read_is_noticed(
    module: ModuleType, name: str, read: Callable[[Path], object], writers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old config fits the new weights, so the mixture would load."""
    writer, find = writers["adapter" if read is read_adapter else "model"], getattr(module, name)

    def find_after_the_writer(folder: Path, *rest: object) -> object:
        writer.new(folder)
        return find(folder, *rest)

    writer.old(tmp_path / "folder")
    monkeypatch.setattr(module, name, find_after_the_writer)
    with pytest.raises(GPT2Error, match=r"was written while it was read: load it again$"):
        read(tmp_path / "folder")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_of_each_writer(name: str, writers: dict[str, Writer], tmp_path: Path) -> None:
    killing = Killing(writers[name], tmp_path)
    n_operations = 0
    while killing.kill_after(n_operations):
        n_operations += 1
    print(f"{name}: {killing.n_killed} kills, {killing.n_unfinished} of them refused, 0 mixtures, 0 leftovers")
    assert killing.n_killed > 10
