"""Documents are read unchanged, in pieces, and each document is on one side of the split."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.training.corpus import Corpus, CorpusLimits, Piece, Split, last_cut
from gpt_config import DataError
from gpt_encoder import GPT2Tokenizer


def documents(pieces: Iterable[Piece]) -> list[str]:
    found = [""]
    for piece in pieces:
        found[-1] += piece.text
        if piece.ends:
            found.append("")
    assert found.pop() == "", "the last document has no end"
    return found


def test_a_separator_line_separates_documents_and_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\nmore\n<|endoftext|>\n two\n<|endoftext|>\n\n<|endoftext|>three\n")
    assert documents(Corpus([tmp_path / "a.txt"]).pieces()) == ["one\n\nmore", " two", "three"]


def test_a_file_without_separators_is_one_unchanged_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\n line\r\nend é\n".encode())
    assert documents(Corpus([tmp_path / "a.txt"]).pieces()) == ["\n line\r\nend é\n"]


def test_folders_jsonl_and_compressed_files(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt.xz").write_bytes(lzma.compress(b"from xz"))
    (folder / "deep" / "a.jsonl.gz").write_bytes(
        gzip.compress(json.dumps({"text": "from <|endoftext|> gz"}).encode() + b"\n\n")
    )
    (folder / "a.txt").write_text("plain")
    (folder / "ignored.csv").write_text("no")
    assert documents(Corpus([folder]).pieces()) == ["plain", "from xz", "from <|endoftext|> gz"]


@pytest.mark.parametrize("line", ["{", '{"body": "x"}', '{"text": 3}', "[1]"])
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2"):
        list(Corpus([path]).pieces())


def test_bytes_that_are_not_utf_8_are_replaced_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 \xff\xfe" + "é\ufffd".encode())
    corpus = Corpus([path])
    assert documents(corpus.pieces()) == ["caf\ufffd \ufffd\ufffdé\ufffd"]
    assert corpus.replaced_bytes == 3


def test_missing_files_and_damaged_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text")[:10] + b"not gzip")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"x" * 1000)[:-20])
    (tmp_path / "empty").mkdir()
    for name in ("a.txt.gz", "b.txt.xz", "none.txt", "empty"):
        with pytest.raises(DataError, match=name):
            list(Corpus([tmp_path / name]).pieces())


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=1),
    st.integers(8, 60),
    st.integers(20, 60),
)
def test_pieces_of_any_length_make_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], block: int, piece: int
) -> None:
    texts = [text for text in texts if "<|endoftext|>" not in text] or ["x"]
    path = tmp_path_factory.mktemp("c") / "a.txt"
    path.write_bytes("\n<|endoftext|>\n".join(texts).encode())
    corpus = Corpus([path], limits=CorpusLimits(block, piece))
    # A mark at the start of a line is no text. A document of nothing else is none.
    expected = [text.lstrip("\ufeff") for text in texts]
    assert documents(corpus.pieces()) == [text for text in expected if text]


def test_a_long_record_is_one_document_in_pieces(tmp_path: Path) -> None:
    texts = ["one two three " * 20, "x" * 90, "four"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pieces = list(Corpus([tmp_path / "a.jsonl"], limits=CorpusLimits(piece_length=20)).pieces())
    assert documents(pieces) == texts and [piece.ends for piece in pieces].count(False) > 10


@given(st.text(st.sampled_from(" \n\tab1'.é"), min_size=30, max_size=200))
def test_a_cut_between_pieces_changes_no_ids(openai_tokenizer: GPT2Tokenizer, text: str) -> None:
    cut = last_cut(text)
    parts = [text[:cut], text[cut:]] if cut else [text]
    assert list(chain.from_iterable(map(openai_tokenizer.encode, parts))) == openai_tokenizer.encode(text)


def test_many_documents_are_split_by_their_content(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["owl", "cat", "dog", "sea", "bread"], k=20)) for _ in range(2000)]
    for name, these in (("a.txt", texts), ("b.txt", texts[::-1])):
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(these))
    sides = {}
    for name in ("a.txt", "b.txt"):
        corpus = Corpus([tmp_path / name])
        sides[name] = [(piece.text, side) for side, piece in Split.of(corpus, 0.1).sides(corpus)]
    assert sorted(sides["a.txt"]) == sorted(sides["b.txt"])
    assert 150 < sum(side for _, side in sides["a.txt"]) < 250


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.floats(0.01, 0.99))
def test_the_end_of_each_of_few_documents_is_for_validation(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("few")
    texts = [("ab " * length)[:length].replace("  ", " ") for length in lengths]
    (folder / "a.txt").write_text("<|endoftext|>".join(texts))
    # Pieces are short, so that the cut is within, before and after pieces.
    corpus = Corpus([folder / "a.txt"], limits=CorpusLimits(piece_length=40))
    found = list(Split.of(corpus, fraction).sides(corpus))
    train, validation = ([piece for side, piece in found if side is wanted] for wanted in (False, True))
    cuts = [int(len(text) * (1 - fraction)) for text in texts]
    if not any(cuts):  # nothing would remain for training
        longest = texts.index(max(texts, key=len))
        only = len(texts[longest]) > 1
        cuts = [int(place == longest if only else place < len(texts) - 1) for place in range(len(texts))]
    assert documents(train) == [text[:cut] for text, cut in zip(texts, cuts, strict=True) if cut]
    assert documents(validation) == [text[cut:] for text, cut in zip(texts, cuts, strict=True) if text[cut:]]


ROWS = [{"n": 1, "text": 'The cat sat, and "slept".'}, {"n": 2, "text": "Le chat – 猫\nand more."}]
EXPECTED = [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.NDJSON", "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in ROWS)),
        ("a.txt", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("strings.json", json.dumps(EXPECTED)),
        ("a.csv", 'n,text\n1,"The cat sat, and ""slept""."\n2,"Le chat – 猫\nand more."\n'),
        ("a.csv", 'n;text\n1;"The cat sat, and ""slept""."\n2;"Le chat – 猫\nand more."\n'),
        ("a.txt", 'n\ttext\n1\t"The cat sat, and ""slept""."\n2\t"Le chat – 猫\nand more."\n'),
        ("a.md", "<|endoftext|>".join(EXPECTED)),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, content: str) -> None:
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / name).write_bytes(content.encode(encoding))
        assert documents(Corpus([tmp_path / name]).pieces()) == EXPECTED
    (tmp_path / "packed").write_bytes(lzma.compress(content.encode()))
    if not name.endswith((".csv", "strings.json")):  # these need their suffix
        assert documents(Corpus([tmp_path / "packed"]).pieces()) == EXPECTED


def test_parquet_arrow_and_another_field(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.Table.from_pylist([{"n": row["n"], "body": row["text"]} for row in ROWS])
    parquet.write_table(table, tmp_path / "a.parquet")
    for name, writer in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with open(tmp_path / name, "wb") as file, writer(file, table.schema) as out:
            out.write_table(table)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.parquet.zst").write_bytes(pytest.importorskip("zstandard").compress(content))
    for name in ("a.parquet", "a.parquet.gz", "a.parquet.zst", "file.arrow", "stream.arrow"):
        assert documents(Corpus([tmp_path / name], "body").pieces()) == EXPECTED
    with pytest.raises(DataError, match=r"row 1: no field 'text' \(it has 'n', 'body'\)"):
        list(Corpus([tmp_path / "a.parquet"]).pieces())


@pytest.mark.parametrize("writer", ["new_file", "new_stream"])
def test_every_row_of_every_batch_is_read_once(tmp_path: Path, writer: str) -> None:
    """Batches of 1100 rows are read in parts; there are three."""
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"n": list(range(2500)), "text": [f"text {n}" for n in range(2500)]})
    with open(tmp_path / "a.arrow", "wb") as file, getattr(pa.ipc, writer)(file, table.schema) as out:
        out.write_table(table, max_chunksize=1100)
    assert documents(Corpus([tmp_path / "a.arrow"]).pieces()) == [f"text {n}" for n in range(2500)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"text": "a"} {"text": "b"}]', "no comma after item 1"),
        ('[{"text": "a"}] [{"text": "b"}]', "there is more after its list"),
    ],
)
def test_a_list_that_is_not_json_is_named(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=reason):
        list(Corpus([tmp_path / "a.json"]).pieces())


@pytest.mark.parametrize("row", ["1,a,b", "1"])
def test_a_row_of_another_width_is_named(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.csv").write_text(f"n,text\n1,a\n{row}\n")
    with pytest.raises(DataError, match=r"line 3: it has . columns instead of 2"):
        list(Corpus([tmp_path / "a.csv"]).pieces())


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,text,text\n1,a,b\n")
    with pytest.raises(DataError, match="has 2 columns 'text': rename all but one"):
        list(Corpus([tmp_path / "a.csv"]).pieces())


def test_marks_within_joined_files_and_a_second_reading(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\ufefftwo \ufeff three\n".encode() + b"caf\xe9")
    corpus = Corpus([tmp_path / "a.txt"])
    for _ in range(2):
        assert documents(corpus.pieces()) == ["one\ntwo \ufeff three\ncaf\ufffd"] and corpus.replaced_bytes == 1


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="pip install pyarrow"):
        list(Corpus([tmp_path / "a.parquet"]).pieces())


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "bad \\ud83d half, good \\ud83e\\udd99 pair"}')
    corpus = Corpus([tmp_path / "a.jsonl"])
    assert documents(corpus.pieces()) == ["bad \ufffd half, good 🦙 pair"]
    assert (corpus.replaced_bytes, corpus.replaced_halves) == (0, 1)


@pytest.mark.parametrize("alike", ["the same text", "LICENCE " * 600])
def test_documents_that_begin_alike_leave_no_side_empty(tmp_path: Path, alike: str) -> None:
    texts = [alike + (f" story {n}" * 20 if "LICENCE" in alike else "") for n in range(150)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    corpus = Corpus([tmp_path / "a.txt"])
    sides = list(Split.of(corpus, 0.1).sides(corpus))
    n_validation = sum(len(piece.text) for side, piece in sides if side)
    assert 0.03 < n_validation / sum(map(len, texts)) < 0.2
