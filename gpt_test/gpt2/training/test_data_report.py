"""The report on data agrees with counts that are written out here."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.training import TrainingData, prepare
from gpt2.training.data_report import DataReport, report_of, report_of_rows
from gpt2.training.token_file import TokenFile
from gpt_encoder import CharTokenizer

EOT = 4


def data_of(train: list[list[int]], validation: list[list[int]]) -> TrainingData:
    files = []
    for documents in (train, validation):
        ids = [token for document in documents for token in (*document, EOT)]
        files.append(TokenFile(Path("a.bin"), np.array(ids, np.uint16), 5, 10, bytes(24)))
    return TrainingData(*files, CharTokenizer("abcd"))


def grams(documents: list[list[int]]) -> list[tuple[int, ...]]:
    return [tuple(document[i : i + 13]) for document in documents for i in range(len(document) - 12)]


DOCUMENTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=30), min_size=1, max_size=8)


@given(DOCUMENTS, DOCUMENTS)
def test_figures_are_those_of_a_plain_count(train: list[list[int]], validation: list[list[int]]) -> None:
    report = report_of(data_of(train, validation))
    rows = report_of_rows(train, validation, CharTokenizer("abcd"))
    assert (rows.training.tokens, rows.training.bytes) == (sum(map(len, train)),) * 2
    changed = {"tokens": 0, "bytes": 0}
    for one, other in ((rows.training, report.training), (rows.validation, report.validation)):
        assert replace(one, **changed) == replace(other, **changed)
    assert (rows.shared_documents, rows.shared_grams) == (report.shared_documents, report.shared_grams)
    lengths = sorted(map(len, train))
    assert (report.training.documents, report.training.shortest, report.training.longest) == (
        len(train), lengths[0], lengths[-1],
    )  # fmt: skip
    assert report.training.duplicates == sum(a == b for a, b in pairwise(sorted(train)))
    assert report.shared_documents == sum(document in train for document in validation)
    known, wanted = set(grams(train)), grams(validation)
    expected = sum(gram in known for gram in wanted) / len(wanted) if wanted else None
    assert report.shared_grams == (expected if expected is None else pytest.approx(expected))


def test_documents_longer_than_a_chunk_are_compared_whole() -> None:
    long = [*np.random.default_rng(0).integers(0, 4, 1 << 20).tolist(), 1, 2, 3]
    report = report_of(data_of([[1, 2], long, [3]], [long, [*long[:-1], 0]]))
    assert report.shared_documents == 1 and report.training.longest == len(long)
    assert report.shared_grams == pytest.approx(1, abs=1e-5)
    seam = (1 << 20) - 3  # of two chunks, in the long document
    assert report_of(data_of([[1, 2], long], [long[seam - 10 : seam + 3]])).shared_grams == 1


def test_a_run_on_texts_reports_what_its_validation_shares(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["owl", "cat", "dog", "sea"], k=30)) for _ in range(30)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join([*texts, texts[0]]))
    (tmp_path / "b.txt").write_text("<|endoftext|>".join([texts[3], "something else that nobody has written here before"]))
    report: DataReport = report_of(
        prepare([tmp_path / "a.txt"], tmp_path / "d", tokenizer="char", validation_data=[tmp_path / "b.txt"])
    )
    assert (report.training.documents, report.training.duplicates, report.shared_documents) == (31, 1, 1)
    assert report.training.bytes_per_token == pytest.approx(1, abs=0.02)
    assert report.lines()[0].endswith("; 1 are copies of others") and "1 of 2 documents" in report.lines()[2]


def test_documents_end_at_the_token_of_the_model(small_folder: Path, tmp_path: Path) -> None:
    """It may be another one than that of the tokenizer's files."""
    texts = ["the cat saw", "the dog", "an owl"]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    sides = {"validation_data": [tmp_path / "a.txt"], "workers": 1}
    for _ in ("new", "used again"):
        data = prepare([tmp_path / "a.txt"], tmp_path / "data", tokenizer=str(small_folder), end_token_id=1, **sides)
        report = report_of(data)
        assert (report.training.documents, report.shared_documents) == (3, 3)
        assert data.train.tokens.tolist().count(1) == 3
