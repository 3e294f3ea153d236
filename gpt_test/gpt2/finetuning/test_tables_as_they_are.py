"""Tables of classification, through `prepare_finetuning`: names with blanks, tabs in a CSV file, very long texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2.finetuning.labels import tidy_label
from gpt2.finetuning.run import Finetuning, prepare_finetuning
from gpt_config import FinetuningConfig


def prepared(path: Path, content: str, base: Path) -> Finetuning:
    path.write_text(content)
    config = FinetuningConfig(task="classification", max_steps=1, sample_tokens=0, batch_size=2)
    return prepare_finetuning(base, [path], config, path.parent / "run", is_quiet=True)


@pytest.mark.parametrize("header", [" label , text ", "text ,label"])
def test_blanks_around_names_of_columns_do_not_count(small_folder: Path, tmp_path: Path, header: str) -> None:
    row = "{},{}\n" if header.index("label") < header.index("text") else "{1},{0}\n"
    rows = "".join(row.format(label, f"a {label} goes home") for label in ["cat", "dog"] * 10)
    run = prepared(tmp_path / "a.csv", f"{header}\n{rows}", small_folder)
    assert run.labels == ("cat", "dog") and "16 training texts" in " ".join(run.told), run.told


def test_a_tab_in_the_first_line_of_a_csv_file_is_text(small_folder: Path, tmp_path: Path) -> None:
    rows = "".join(f"{label},a\t{label} goes home\n" for label in ["cat", "dog"] * 10)
    run = prepared(tmp_path / "a.csv", rows, small_folder)
    assert run.labels == ("cat", "dog"), run.told


def test_a_field_of_a_csv_file_has_any_length(small_folder: Path, tmp_path: Path) -> None:
    """Python's reader refuses more than 131,072 characters unless it is told otherwise."""
    rows = "".join(
        f"{label},{text}\n" for label, text in [("cat", "a cat " * 25_000), *[("dog", "a dog"), ("cat", "x")] * 10]
    )
    run = prepared(tmp_path / "a.csv", f"label,text\n{rows}", small_folder)
    assert run.labels == ("cat", "dog") and "1 cut to 40 tokens" in " ".join(run.told), run.told


def test_a_separator_in_labels_is_told(small_folder: Path, tmp_path: Path) -> None:
    rows = "".join(f'"{label}",a text\n' for label in ["cat;1", "dog"] * 10)
    run = prepared(tmp_path / "a.csv", f"label,text\n{rows}", small_folder)
    assert "1 of 2 labels contain ';', such as 'cat;1': is it the separator of the columns?" in run.told, run.told


def test_labels_that_are_numbers_are_in_numerical_order(small_folder: Path, tmp_path: Path) -> None:
    rows = "".join(f"{label},a text\n" for label in ["10", "2", "-1"] * 10)
    assert prepared(tmp_path / "a.csv", f"label,text\n{rows}", small_folder).labels == ("-1", "2", "10")


def test_a_whole_number_is_one_label_however_it_is_written() -> None:
    assert [tidy_label(value) for value in (1, 1.0, "1.0", " 1.00", -0.0, 1e16)] == [*"11110", "1" + "0" * 16]
