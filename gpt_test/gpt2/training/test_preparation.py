"""Token files: ids are read as written, damaged files are refused, and the number of workers changes no byte."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest

from gpt2.training import TrainingData, prepare
from gpt2.training.corpus import CorpusLimits
from gpt2.training.preparation import PreparationLimits
from gpt2.training.token_file import TokenFile, TokenWriter
from gpt_config import ConfigError, DataError, GPT2Warning, WriteError
from gpt_encoder import CharTokenizer, GPT2Tokenizer
from gpt_test.gpt2.weights.room import room_for


@pytest.mark.parametrize("vocab_size", [10, 65536, 65537])
def test_a_token_file_keeps_its_ids(tmp_path: Path, vocab_size: int) -> None:
    ids = np.array([0, 3, vocab_size - 1], np.uint16 if vocab_size <= 65536 else np.uint32)
    with TokenWriter(tmp_path / "a.bin", vocab_size, b"f" * 24) as writer:
        writer.append(ids[:1].tobytes(), 5)
        writer.append(ids[1:].tobytes(), 6)
    file = TokenFile.open(tmp_path / "a.bin")
    assert file.tokens.tolist() == ids.tolist()
    assert (file.vocab_size, file.n_bytes, file.fingerprint, len(file)) == (vocab_size, 11, b"f" * 24, 3)
    assert isinstance(file.tokens, np.memmap)


def test_a_token_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk: list[int] = []
    replace = os.replace

    def check_and_replace(source: Path, target: Path) -> None:
        assert os.stat(source).st_ino in on_disk
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: on_disk.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", check_and_replace)
    with TokenWriter(tmp_path / "a.bin", 10, b"f" * 24) as writer:
        writer.append(bytes(20), 5)
    assert len(TokenFile.open(tmp_path / "a.bin")) == 10


def test_damaged_token_files_are_refused(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "a.bin", 10, b"f" * 24) as writer:
        writer.append(bytes(20), 5)
    whole = (tmp_path / "a.bin").read_bytes()
    for content in (b"", whole[:30], b"X" + whole[1:], whole[:-1], whole[:8] + b"\x02" + whole[9:]):
        (tmp_path / "b.bin").write_bytes(content)
        with pytest.raises(DataError, match=r"b\.bin"):
            TokenFile.open(tmp_path / "b.bin")


def test_an_interrupted_token_file_is_deleted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TokenWriter(tmp_path / "a.bin", 10, b"f" * 24) as writer:
        writer.append(bytes(20), 5)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_tokens_of_both_files_encode_the_text(text_file: Path, tmp_path: Path) -> None:
    data = prepare([text_file], tmp_path, tokenizer="bpe", vocab_size=270)
    text = text_file.read_text()
    cut = int(len(text) * 0.9)
    eot = data.tokenizer.eot_token_id
    assert data.train.tokens.tolist() == [*data.tokenizer.encode(text[:cut]), eot]
    assert data.validation.tokens.tolist() == [*data.tokenizer.encode(text[cut:]), eot]
    assert data.train.n_bytes == len(text[:cut].encode())
    assert isinstance(GPT2Tokenizer.from_pretrained(tmp_path), GPT2Tokenizer)


def test_any_number_of_workers_writes_the_same_bytes(text_file: Path, tmp_path: Path) -> None:
    limits = PreparationLimits(job_length=2000, pieces=CorpusLimits(block_bytes=700, piece_length=500))
    for workers in (1, 3):
        prepare([text_file], tmp_path / str(workers), tokenizer="gpt2", workers=workers, limits=limits)
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_files_are_used_again_only_if_nothing_changed(text_file: Path, tmp_path: Path) -> None:
    source, files = tmp_path / "a.txt", [tmp_path / "data" / name for name in ("train.bin", "val.bin")]
    source.write_text(text_file.read_text())

    def are_written(**changes: float) -> bool:
        for file in files:
            if file.exists():
                os.utime(file, (0, 0))
        prepare([source], tmp_path / "data", tokenizer="char", **changes)
        written = {file.stat().st_mtime_ns > 0 for file in files}
        assert len(written) == 1, "both files are written, or neither"
        return written.pop()

    assert [are_written(), are_written(), are_written(validation_fraction=0.2)] == [True, False, True]
    source.write_text(text_file.read_text() + "More.")
    assert are_written(validation_fraction=0.2)
    assert "M" in TrainingData.open(tmp_path / "data").tokenizer.characters


def test_other_options_encode_again(tmp_path: Path, small_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the cat<|endoftext|> saw"}\n' * 9)
    kept = {"tokenizer": str(small_folder), "validation_data": [tmp_path / "a.jsonl"], "workers": 1}
    found = []
    for options in ({}, {"special_tokens": True}, {"end_token_id": 3}, {"special_tokens": True, "end_token_id": 3}):
        spelled = pytest.warns(GPT2Warning, match=r"the text spells the special token '<\|endoftext\|>'")
        with contextlib.nullcontext() if "special_tokens" in options else spelled:
            data = prepare([tmp_path / "a.jsonl"], tmp_path / "data", **kept, **options)
        found.append(data.train.tokens.tolist())
    assert len(set(map(tuple, found))) == 4


def test_another_field_and_other_validation_data_encode_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc", "body": "cab"}\n' * 9)
    (tmp_path / "b.jsonl").write_text('{"text": "abc", "body": "cab"}\n')
    files = {"validation_data": [tmp_path / "b.jsonl"], "tokenizer": "char", "workers": 1}
    for text_field, expected in (("text", "abc"), ("body", "cab")):
        data = prepare([tmp_path / "a.jsonl"], tmp_path / "data", text_field=text_field, **files)
        assert data.tokenizer.decode(data.train.tokens[:3]) == expected
    (tmp_path / "b.jsonl").write_text('{"body": "bb"}\n')
    data = prepare([tmp_path / "a.jsonl"], tmp_path / "data", text_field="body", **files)
    assert data.tokenizer.decode(data.validation.tokens[:2]) == "bb"


def test_files_of_two_preparations_do_not_belong_together(text_file: Path, tmp_path: Path) -> None:
    for fraction in (0.1, 0.2):
        prepare([text_file], tmp_path / str(fraction), tokenizer="char", validation_fraction=fraction)
    os.replace(tmp_path / "0.1" / "val.bin", tmp_path / "0.2" / "val.bin")
    with pytest.raises(DataError, match="were not encoded together"):
        TrainingData.open(tmp_path / "0.2")


def test_a_separate_validation_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 50)
    (tmp_path / "b.txt").write_text("cab")
    data = prepare([tmp_path / "a.txt"], tmp_path / "d", tokenizer="char", validation_data=[tmp_path / "b.txt"])
    assert data.tokenizer.decode(data.train.tokens) == "abc" * 50 + "<|endoftext|>"
    assert data.tokenizer.decode(data.validation.tokens) == "cab<|endoftext|>"


def test_unusable_data_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "breaks.txt").write_bytes(b"<|endoftext|>\n<|endoftext|>")
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        prepare([tmp_path / "empty.txt"], tmp_path / "d")
    with pytest.raises(DataError, match="no text"):
        prepare([tmp_path / "breaks.txt"], tmp_path / "d", tokenizer="char")
    with pytest.raises(ConfigError, match="validation_fraction=0"):
        prepare([tmp_path / "breaks.txt"], tmp_path / "d", validation_fraction=0)
    with pytest.raises(ConfigError, match="vocab_size=300"):
        prepare([tmp_path / "breaks.txt"], tmp_path / "d", tokenizer="char", vocab_size=300)


@pytest.mark.parametrize("name", ["a.txt", "a.bin", "a.jsonl"])
def test_an_error_leaves_no_folder(small_folder: Path, tmp_path: Path, name: str) -> None:
    """A side without two tokens, and a bad line at the end of the data, are noticed when much was already read."""
    path, folder = tmp_path / name, tmp_path / "out" / "data"
    np.array([1, 2], np.uint16).tofile(path) if name == "a.bin" else path.write_text("a")
    tokenizer = str(small_folder) if name == "a.bin" else "char"
    if name == "a.jsonl":
        path.write_text('{"text": "a text"}\n' * 3 + '{"text": 3}\n')
    with pytest.raises(DataError, match="at least 2 are needed: add text" if name != "a.jsonl" else "line 4"):
        prepare([path], folder, tokenizer=tokenizer, workers=1)
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    (folder / "mine").write_text("x")
    with pytest.raises(DataError):
        prepare([path], folder, tokenizer=tokenizer, workers=1)
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_a_warning_counts_replaced_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"coffee with milk " * 200 + b"caf\xe9 au lait " * 20)
    with pytest.warns(GPT2Warning, match="20 bytes"):
        prepare([tmp_path / "a.txt"], tmp_path / "d", tokenizer="char")


def test_a_full_disk_leaves_no_token_file(text_file: Path, tmp_path: Path) -> None:
    with room_for(20_000), pytest.raises(WriteError, match=r"train\.bin"):
        prepare([text_file], tmp_path / "d", tokenizer="char")
    assert not list((tmp_path / "d").glob("*.bin")) and not list((tmp_path / "d").glob(".*.tmp"))
    assert issubclass(WriteError, OSError)


def test_tokenizers_can_be_pickled_for_a_spawned_process(small_tokenizer: GPT2Tokenizer) -> None:
    import pickle

    for tokenizer in (small_tokenizer, CharTokenizer("abc")):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode("cab") == tokenizer.encode("cab")


def test_a_long_document_has_one_end_of_text(small_folder: Path, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """It is encoded in pieces of about 2**20 characters; only the last piece ends the document."""
    (tmp_path / "long.txt").write_text("once upon a time " * 70_000)  # 1.19 million characters
    (tmp_path / "short.txt").write_text("a cat")
    data = prepare(
        [tmp_path / "long.txt"], tmp_path / "data", tokenizer=str(small_folder), validation_data=[tmp_path / "short.txt"],
        workers=1,
    )  # fmt: skip
    assert (data.train.tokens == small_tokenizer.eot_token_id).nonzero()[0].tolist() == [len(data.train) - 1]


def test_a_text_of_the_same_size_is_read_again(tmp_path: Path) -> None:
    """Its time of change is another one."""
    source = tmp_path / "a.txt"
    found = []
    for second, letter in enumerate("xyx"):
        source.write_text(letter * 400)
        os.utime(source, (1000 + second, 1000 + second))
        data = prepare([source], tmp_path / "data", tokenizer="char", workers=1)
        found.append(data.tokenizer.decode(data.train.tokens[:1].tolist()))
    assert found == ["x", "y", "x"]
