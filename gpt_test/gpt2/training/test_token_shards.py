"""Token ids of nanoGPT, llm.c, build-nanogpt and this package are trained on as they are, or refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from gpt2.training import prepare
from gpt2.training.token_file import TokenWriter
from gpt2.training.token_shards import open_shard, split_by_name
from gpt_config import DataError

IDS = np.random.default_rng(0).integers(0, 50257, 700)
IDS[3] = 50256  # the end of a document, which has no bytes of text


def write(folder: Path, form: str) -> Path:
    if form == "nanogpt":
        IDS.astype(np.uint16).tofile(folder / "train.bin")
        return folder / "train.bin"
    if form == "llmc":
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(IDS)
        (folder / "a.bin").write_bytes(header.tobytes() + IDS.astype(np.uint16).tobytes())
        return folder / "a.bin"
    if form.startswith("npy"):
        np.save(folder / "a.npy", IDS.astype(form[3:]))
        return folder / "a.npy"
    if form == "gz":
        np.save(folder / "b.npy", IDS.astype(np.uint16))
        (folder / "b.npy.gz").write_bytes(gzip.compress((folder / "b.npy").read_bytes()))
        return folder / "b.npy.gz"
    with TokenWriter(folder / "own.bin", 50257, bytes(24)) as writer:
        writer.append(IDS.astype(np.uint16).tobytes(), 5)
    return folder / "own.bin"


@pytest.mark.parametrize("form", ["nanogpt", "llmc", "npyuint16", "npyint32", "npyint64", "gz", "own"])
def test_ids_are_read_as_they_were_written(tmp_path: Path, form: str) -> None:
    shard = open_shard(write(tmp_path, form))
    assert shard.tokens.tolist() == IDS.tolist()
    data = prepare([shard.name], tmp_path / "d", validation_fraction=0.25)
    assert data.train.tokens.tolist() == IDS[:525].tolist() and data.validation.tokens.tolist() == IDS[525:].tolist()
    n_bytes = [len(data.tokenizer.decode_bytes([token])) for token in IDS[:525].tolist() if token != 50256]
    assert data.train.n_bytes == sum(n_bytes)


def test_several_shards_are_split_by_their_names(tmp_path: Path) -> None:
    for number, name in enumerate(("edu_train_000001", "edu_train_000002", "edu_val_000000")):
        np.save(tmp_path / f"{name}.npy", np.full(9, number, np.uint16))
    told: list[str] = []
    data = prepare([tmp_path], tmp_path / "out" / "d", tell=told.append)
    assert data.train.tokens.tolist() == [0] * 9 + [1] * 9 and data.validation.tokens.tolist() == [2] * 9
    assert told == ["3 files", "edu_val_000000.npy for validation, by name"]
    assert split_by_name([Path("valley.bin"), Path("train.bin")])[1] == []


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "nanogpt")
    (tmp_path / "a.txt").write_text("A text.")
    with pytest.raises(DataError, match="tokenizer=char cannot learn"):
        prepare([path], tmp_path / "d", tokenizer="char")
    with pytest.raises(DataError, match=r"contains id \d+, and the tokenizer has"):
        prepare([path], tmp_path / "d", tokenizer="gpt2-tiny")
    with pytest.raises(DataError, match="files of one kind"):
        prepare([path, tmp_path / "a.txt"], tmp_path / "d")
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(DataError, match=r"meta\.pkl"):
        prepare([path], tmp_path / "d")
    llmc = write(tmp_path, "llmc")
    llmc.write_bytes(llmc.read_bytes()[:-2])
    np.save(tmp_path / "matrix.npy", np.zeros((2, 2), np.uint16))
    (tmp_path / "short.bin").write_bytes(llmc.read_bytes()[:500])
    with pytest.raises(DataError, match="less than llm"):
        open_shard(tmp_path / "short.bin")
    (tmp_path / "odd.bin").write_bytes(IDS.astype(np.uint16).tobytes() + b"\0")
    for name, reason in (("a.bin", "damaged"), ("matrix.npy", r"shape \(2, 2\)"), ("odd.bin", "NUL bytes")):
        with pytest.raises(DataError, match=reason):
            open_shard(tmp_path / name)
    np.save(tmp_path / "negative.npy", np.array([5, -1]))
    with pytest.raises(DataError, match="contains id -1"):
        open_shard(tmp_path / "negative.npy").check(10, "the tokenizer")
    assert not (tmp_path / "d").exists()
