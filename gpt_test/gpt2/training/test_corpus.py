"""Documents are read unchanged, in pieces, and each document is on one side of the split."""

from __future__ import annotations

import gzip
import json
import lzma
import random
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
    (tmp_path / "a.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"x" * 1000)[:-20])
    (tmp_path / "empty").mkdir()
    for name in ("a.txt.gz", "b.txt.xz", "none.txt", "empty"):
        with pytest.raises(DataError, match=name):
            list(Corpus([tmp_path / name]).pieces())


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), min_size=1), min_size=1),
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
    expected = [text.removeprefix("\ufeff") if i == 0 else text for i, text in enumerate(texts)]
    assert documents(corpus.pieces()) == expected


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
    assert documents(train) == [text[:cut] for text, cut in zip(texts, cuts, strict=True) if cut]
    assert documents(validation) == [text[cut:] for text, cut in zip(texts, cuts, strict=True) if text[cut:]]
