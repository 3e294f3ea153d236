"""Folders: what is data is read, what is not is left out and counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gpt2.data.folders import list_files
from gpt_config import DataError


def write(path: Path, content: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def names(folder: Path, **options: object) -> list[str]:
    return [str(path.relative_to(folder)) for path in list_files([folder], **options).files]


def test_data_files_of_any_case_are_read_and_the_rest_is_counted(tmp_path: Path) -> None:
    for name in (
        "B.TXT",
        "a.txt",
        "deep/c.JSONL.GZ",
        "d.Md",
        ".hidden.txt",
        "._a.txt",
        ".git/config.txt",
        "a.txt~",
        "#b.txt#",
    ):
        write(tmp_path / name)
    for name in ("photo.png", "run.py", "~$e.csv"):
        write(tmp_path / name)
    write(tmp_path / "empty.txt", "")
    os.mkfifo(tmp_path / "pipe.txt")
    listing = list_files([tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in listing.files] == ["B.TXT", "a.txt", "d.Md", "deep/c.JSONL.GZ"]
    assert listing.left_out == {
        "hidden": 4, "editors' or downloads' leftovers": 2, ".png": 1, ".py": 1, "empty": 1, "not regular files": 1
    }  # fmt: skip
    assert listing.lines()[0].startswith("4 files, 10 left out (4 hidden, 2 editors'")


@pytest.mark.parametrize(
    "own",
    [
        ("config.json", "model.safetensors", "merges.txt"),
        ("training.json", "metrics.jsonl", "notes.txt"),
        ("char_vocab.json", "train.bin", "val.bin"),
        ("vocab.json", "merges.txt"),
        ("adapter_config.json", "README.md"),
        ("step-00000001.safetensors", "notes.txt"),
        ("trainer_state.json", "notes.txt"),
    ],
)
def test_folders_of_models_runs_and_tokenizers_are_left_out(tmp_path: Path, own: tuple[str, ...]) -> None:
    write(tmp_path / "a.txt")
    for name in own:
        write(tmp_path / "out" / name)
        write(tmp_path / "out" / "checkpoints" / "b.txt")
    assert names(tmp_path) == ["a.txt"]


def test_files_of_a_model_beside_a_text_are_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "merges.txt", "vocab.json", "config.json", "metrics.jsonl"):
        write(tmp_path / name)
    assert names(tmp_path) == ["a.txt"]


def test_validation_files_are_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name)
    assert names(tmp_path, apart=[tmp_path / "b.txt"]) == ["a.txt"]


def test_a_link_to_a_folder_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt")
    (tmp_path / "in" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert [path.name for path in list_files([tmp_path]).files] == ["a.txt"]


def test_a_folder_without_data_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no data files .*left out: 1 \.png"):
        list_files([tmp_path])
    with pytest.raises(DataError, match="there is no file or folder"):
        list_files([tmp_path / "none"])


def save_dataset(folder: Path, indices: object = None) -> None:
    state = {"_data_files": [{"filename": f"data-0000{n}-of-00002.arrow"} for n in (1, 0)], "_indices_data_files": indices}
    write(folder / "state.json", json.dumps(state))
    write(folder / "dataset_info.json", "{}")
    for n in (0, 1):
        write(folder / f"data-0000{n}-of-00002.arrow")


def test_a_saved_dataset_is_its_arrow_files_of_the_train_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_dataset(tmp_path / split)
    write(tmp_path / "dataset_dict.json", json.dumps({"splits": ["train", "test"]}))
    listing = list_files([tmp_path])
    assert [path.name for path in listing.files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert listing.files[0].parent.name == "train" and "train is read" in listing.lines()[1]
    save_dataset(tmp_path / "test", [{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="flatten_indices"):
        list_files([tmp_path / "test"])
    state = json.loads((tmp_path / "test" / "state.json").read_text())
    state["_indices_files"] = state.pop("_indices_data_files")  # the name in older versions
    write(tmp_path / "test" / "state.json", json.dumps(state))
    with pytest.raises(DataError, match="flatten_indices"):
        list_files([tmp_path / "test"])
    (tmp_path / "train" / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="is missing"):
        list_files([tmp_path])
