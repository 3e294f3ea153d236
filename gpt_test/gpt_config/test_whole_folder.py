"""Folders are replaced as a whole, by one writer at a time; what killed writers left is removed, and nothing else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpt_config import CheckpointError, GPT2Config, GPT2Warning, WriteError
from gpt_config.atomic_write import atomic_write_text, temporary_folder
from gpt_config.unfinished import check_finished, is_unfinished, unchanged
from gpt_config.whole_folder import whole_folder

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, *names: str, text: str = "new") -> None:
    with whole_folder(folder) as new:
        for name in names:
            atomic_write_text(new / name, text)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        ({"model.safetensors", "notes"}, {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}, {"notes"}),
        ({"model-00001-of-00009.safetensors", "pytorch_model.bin.index.json"}, {"model.safetensors"}, set()),
        ({"pytorch_model-00001-of-00002.bin", "model.onnx"}, {"model.safetensors"}, {"model.onnx"}),
        ({"vocab.json", "merges.txt", "added_tokens.json", "config.json"}, {"char_vocab.json"}, {"config.json"}),
        ({"hparams.json", "generation_config.json", "classifier.json", "vocab.bpe"}, {"config.json"}, {"vocab.bpe"}),
        ({"adapter_model.bin", "classifier.json"}, {"adapter_config.json", "adapter_model.safetensors"}, set()),
    ],
)
def test_a_new_file_replaces_all_files_of_its_kind(old: set[str], new: set[str], kept: set[str], tmp_path: Path) -> None:
    for name in old:
        (tmp_path / name).write_text("old")
    write(tmp_path, *new)
    assert names_in(tmp_path) == new | kept
    assert {name: (tmp_path / name).read_text() for name in new | kept} == dict.fromkeys(new, "new") | dict.fromkeys(
        kept, "old"
    )


def test_an_error_in_the_block_changes_nothing_and_names_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "config.json", text="old")
    with pytest.raises(KeyError), whole_folder(tmp_path) as new:
        atomic_write_text(new / "config.json", "new")
        raise KeyError
    with (
        pytest.raises(WriteError, match="cannot write") as caught,
        whole_folder(tmp_path) as new,
        whole_folder(new) as inner,
    ):
        atomic_write_text(inner / ("x" * 300), "new")
    assert str(tmp_path / "xxx") in str(caught.value) and ".tmp" not in str(caught.value)
    assert names_in(tmp_path) == {"config.json"} and (tmp_path / "config.json").read_text() == "old"


def test_an_inner_block_removes_nothing_that_the_outer_one_has_written(tmp_path: Path) -> None:
    write(tmp_path, "adapter_model.bin", "classifier.json", text="old")
    with whole_folder(tmp_path) as new:
        atomic_write_text(new / "classifier.json", "new")
        write(new, "adapter_config.json", "adapter_model.safetensors")
    assert names_in(tmp_path) == {"adapter_config.json", "adapter_model.safetensors", "classifier.json"}
    assert (tmp_path / "classifier.json").read_text() == "new"


def test_a_second_writer_is_refused_in_one_line(tmp_path: Path) -> None:
    """Another thread and another process; after the block, both can write."""
    code = (
        "import sys; from gpt_config.whole_folder import whole_folder; from gpt_config import WriteError\n"
        "try:\n    with whole_folder(sys.argv[1]) as new: (new / 'config.json').write_text('other')\n"
        "except WriteError as error: print(error)"
    )
    command, refused = [sys.executable, "-c", code, str(tmp_path)], []

    def other_thread() -> None:
        try:
            write(tmp_path, "config.json", text="other")
        except WriteError as error:
            refused.append(str(error))

    with whole_folder(tmp_path) as new:
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        refused.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.rstrip("\n"))
        atomic_write_text(new / "config.json", "mine")
    line = f"another program is writing to {tmp_path}: wait until it ends, or choose another folder"
    assert refused == [line, line] and (tmp_path / "config.json").read_text() == "mine"
    other_thread()
    assert len(refused) == 2 and (tmp_path / "config.json").read_text() == "other"


def test_what_killed_processes_left_is_removed_and_what_living_ones_use_stays(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from gpt_config.atomic_write import temporary_folder\n"
        "with temporary_folder(Path(sys.argv[1])) as folder:\n    (folder / 'half').write_text('half'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    (abandoned,) = tmp_path.iterdir()
    with temporary_folder(tmp_path) as living:
        assert not abandoned.exists() and living.exists()
        atomic_write_text(tmp_path / "file", "text")
        write(tmp_path, "config.json")
        assert living.exists()
    assert names_in(tmp_path) == {"file", "config.json"}


@pytest.mark.parametrize("mark", [".gpt2-removing", ".gpt2-moving"])
def test_a_marked_folder_is_refused_and_completed_by_the_next_writer(mark: str, tmp_path: Path) -> None:
    (tmp_path / mark).mkdir()
    (tmp_path / mark / "config.json").write_text("new")
    if mark == ".gpt2-removing":
        (tmp_path / "config.json").write_text("old")
    assert is_unfinished(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path} is not whole: .* wait for it, or run it again$"):
        check_finished(tmp_path)
    with pytest.raises(CheckpointError, match="is not whole"):
        GPT2Config.from_folder(tmp_path)
    write(tmp_path, "vocab.json")
    assert names_in(tmp_path) == {"config.json", "vocab.json"} and (tmp_path / "config.json").read_text() == "new"


def test_files_that_readers_open_first_are_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs do not know the mark: a folder without its config is one that they do not open."""
    moved: list[str] = []
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    write(tmp_path, "config.json", "vocab.json", "tokenizer_config.json", "model.safetensors")
    assert set(moved[-4:-2]) == {"vocab.json", "model.safetensors"}
    assert moved[-2:] == ["tokenizer_config.json", "config.json"]


def test_a_folder_that_is_written_while_it_is_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "config.json", "vocab.json", text="same")
    with unchanged(tmp_path):
        atomic_write_text(tmp_path / "metrics.jsonl", "a run writes this file all the time")
    with (
        pytest.raises(CheckpointError, match=f"^{tmp_path} was written while it was read: load it again$"),
        unchanged(tmp_path),
    ):
        write(tmp_path, "config.json", text="same")
    with pytest.raises(CheckpointError, match="was written while it was read"), unchanged(tmp_path):
        write(tmp_path, "config.json", text="same")
        raise ValueError("of a file that was missing for a moment")
    with pytest.raises(ValueError, match="another reason"), unchanged(tmp_path):
        raise ValueError("another reason")
    with pytest.raises(CheckpointError, match="is not whole"), unchanged(tmp_path):
        (tmp_path / ".gpt2-moving").mkdir()


def test_a_folder_in_place_of_a_file_is_found_before_anything_is_removed(tmp_path: Path) -> None:
    write(tmp_path, "config.json", text="old")
    (tmp_path / "vocab.json").mkdir()
    with pytest.raises(WriteError, match=r"cannot write .*vocab\.json: a folder has this name"):
        write(tmp_path, "config.json", "vocab.json")
    assert (tmp_path / "config.json").read_text() == "old" and not is_unfinished(tmp_path)


@pytest.mark.parametrize("place", ["file/below", "file", "null\0byte"])
def test_a_folder_that_cannot_be_made_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(WriteError, match="cannot write ") as caught:
        write(tmp_path / place, "config.json")
    assert "\n" not in str(caught.value) and (tmp_path / "file").read_text() == "old"


def test_without_locks_writing_works_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(GPT2Warning, match=f"{tmp_path} cannot be locked"):
        write(tmp_path, "config.json")
    assert names_in(tmp_path) == {"config.json"}
