"""A file is what its content is, whatever its name; what is no text, records or token ids is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.data.kind import kind_of
from gpt2.data.source import Source
from gpt2.data.text import TextBlocks
from gpt2.weights.writing import write_tensors
from gpt_config import DataError

ROWS = [{"text": "The cat sat."}, {"text": "The dog sat."}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", b"A text.\n", "text"),
        ("README.md", b"[a link](b) and more\n", "text"),
        ("no_suffix", "Ünïcode\n".encode(), "text"),
        ("a.txt", b"ORCS are not ORC files, and BZh is no bzip2", "text"),
        ("a.txt", b"{ a brace } is no JSON\n", "text"),
        ("a.TXT", LINES.encode(), "jsonl"),
        ("A.NDJSON", b"\xef\xbb\xbf" + LINES.encode(), "jsonl"),
        ("a.txt", b"\xef\xbb\xbf" + LINES.encode(), "jsonl"),
        ("a.json", LINES.encode(), "jsonl"),
        ("a.json", json.dumps(ROWS, indent=1).encode(), "json"),
        ("a.jsonl", json.dumps(ROWS).encode(), "jsonl"),  # each line gets an error of its own
        ("a.txt", json.dumps(ROWS).encode(), "json"),
        ("a.csv", b"text\nThe cat sat.\n", "table"),
        ("a.tsv.gz", gzip.compress(b"text\tn\nThe cat sat.\t1\n", mtime=0), "table"),
        ("a.gz", gzip.compress(LINES.encode(), mtime=0), "jsonl"),
        ("misnamed.txt", lzma.compress(b"A text."), "text"),
        ("a.bz2", bz2.compress(b"A text."), "text"),
        ("a.parquet", b"PAR1" + bytes(8), "parquet"),
        ("a.arrow", b"ARROW1\0\0" + bytes(8), "arrow"),
        ("ids.bin", np.arange(300, dtype=np.uint16).tobytes(), "raw"),
        ("a.bin", b"A text that is called bin.", "text"),
        ("a.bin", struct.pack("<3i", 20240520, 1, 2) + bytes(1012) + bytes(4), "llm.c"),
        ("a.bin", struct.pack("<3i", 20240520, 0, 2) + bytes(1012) + bytes(4), "raw"),  # no version of llm.c is 0
        ("a.json", json.dumps(ROWS[0], indent=1).encode(), "json"),
        # What is looked at ends within the second line, or within the first item of the list.
        ("a.txt", (LINES[: LINES.index("\n") + 1] + json.dumps({"text": "long " * 20_000})).encode(), "jsonl"),
        ("a.txt", json.dumps([{"text": "long " * 20_000}]).encode(), "json"),
    ],
)
def test_the_content_decides(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert kind_of(Source(str(tmp_path / name))).name == kind
    assert kind_of(Source(name, content)).name == kind or kind == "raw"


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "a PNG picture"),
        (b"a.txt" + bytes(252) + b"ustar\x0000", "a tar archive"),
        (b"\0\0\0\x18ftypmp42", "a video"),
        (b"%PDF-1.7\nsome text", "a PDF document"),
        (pickle.dumps({"a": list(range(300))}), "a pickle"),
        (b"GGUF" + bytes(20), "a GGUF model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
        (b"text with a \0 byte", "NUL bytes"),
        ("The cat sat on the mat".encode("utf-16-le"), "UTF-16 without a byte-order mark"),
        ("Où est le café ? À côté. ".encode("latin-1") * 9, "not UTF-8 text"),
        (bytes(range(1, 9)) * 40, "control characters"),
        (np.arange(300, dtype=np.uint16).tobytes(), "NUL bytes"),
    ],
)
def test_what_is_none_of_these_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=reason) as raised:
        kind_of(Source(str(tmp_path / "a.txt")))
    assert str(raised.value).startswith(f"{tmp_path / 'a.txt'} ")


@pytest.mark.parametrize(
    ("n_wrong", "n_right", "is_text"), [(8, 20, True), (9, 20, False), (10, 990, True), (11, 989, False)]
)
def test_one_byte_in_a_hundred_may_be_wrong(n_wrong: int, n_right: int, is_text: bool) -> None:
    """And eight in any case."""
    source = Source("a.txt", b"\xe9" * n_wrong + b"x" * n_right)
    if is_text:
        assert kind_of(source).name == "text"
    else:
        with pytest.raises(DataError, match="is not UTF-8 text"):
            kind_of(source)


def test_archives_and_weights_are_refused(tmp_path: Path) -> None:
    import torch

    zipped(tmp_path / "a.docx")
    write_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(3)})
    for name, reason in (("a.docx", "ZIP"), ("model.safetensors", "safetensors")):
        with pytest.raises(DataError, match=reason):
            kind_of(Source(str(tmp_path / name)))


@given(st.binary(min_size=400, max_size=600))
def test_random_bytes_are_never_text(content: bytes) -> None:
    """400 random bytes have no NUL with a probability of 21%, and are UTF-8 with one below 1e-30."""
    if len(set(content)) > 100:
        with pytest.raises(DataError):
            kind_of(Source("a.txt", content))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_marked_encodings_are_decoded(encoding: str) -> None:
    text = 'The "cat" sat – 猫 𝄞\r\n' * 50
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    source = Source("a.txt", mark + text.encode(encoding))
    kind = kind_of(source)
    assert kind.name == "text" and "".join(TextBlocks(source, kind.encoding, block_bytes=7)) == text


@given(st.text(st.sampled_from("ab\n\r\ufeffé"), max_size=40), st.integers(1, 9))
def test_lines_are_those_of_pythons_own_reader(text: str, block_bytes: int) -> None:
    import io

    expected = "\n".join(line.lstrip("\ufeff") for line in text.split("\n"))
    blocks = TextBlocks(Source("a.txt", text.encode()), block_bytes=block_bytes)
    assert list(blocks.lines()) == list(io.StringIO(expected, newline="\n"))
    blocks = TextBlocks(Source("a.txt", text.encode()), block_bytes=block_bytes)
    assert list(blocks.any_lines()) == list(io.StringIO(expected, newline=""))


def test_zstandard_reads_all_frames_and_notices_a_missing_end() -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(f"part {number}\n".encode() * 999) for number in range(3)]
    expected = "".join(f"part {number}\n" * 999 for number in range(3))
    source = Source("a.txt.zst", b"".join(frames))
    assert "".join(TextBlocks(source)) == expected
    with pytest.raises(DataError, match=r"cannot read a\.txt\.zst"):
        list(TextBlocks(Source("a.txt.zst", b"".join(frames)[:-9])))


def test_a_nul_byte_far_within_a_text_is_refused() -> None:
    source = Source("a.txt", b"text " * 20_000 + b"\0")
    assert kind_of(source).name == "text"
    with pytest.raises(DataError, match="it has NUL bytes"):
        list(TextBlocks(source))


def test_damaged_archives_are_named() -> None:
    for name, content in (("a.gz", gzip.compress(b"text" * 999)[:-9]), ("a.xz", lzma.compress(b"text" * 999)[:-9])):
        with pytest.raises(DataError, match=f"cannot read {name}"):
            "".join(TextBlocks(Source(name, content)))
