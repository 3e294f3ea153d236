"""Atomic writes: after any failure the file contains either its old bytes or all of the new ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt_config import WriteError
from gpt_config.atomic_write import atomic_write, atomic_write_text

ROOT = Path(__file__).resolve().parents[2]


def test_it_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    atomic_write_text(path, "one\n")
    atomic_write_text(path, "zwei é\n")
    assert path.read_bytes() == "zwei é\n".encode()
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(error):
        atomic_write(path, fail)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_the_mode_is_that_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    atomic_write_text(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import sys, time; from gpt_config.atomic_write import atomic_write\n"
        "def slow(p):\n    p.write_text('half'); print('writing', flush=True); time.sleep(60)\n"
        "atomic_write(sys.argv[1], slow)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["file/below", "x" * 300, "null\0byte"])
def test_the_error_names_a_path_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(WriteError, match="cannot write ") as caught:
        atomic_write_text(tmp_path / name, "new")
    assert isinstance(caught.value, OSError) and "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "old"


def test_the_mode_is_ordinary_after_the_writer_replaced_the_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")

    def replace_it(path: Path) -> None:
        path.unlink()
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    atomic_write(tmp_path / "file", replace_it)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss of power, a file that was renamed before its bytes were written would be empty."""
    done: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        done.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        done.append(("replace", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    atomic_write_text(tmp_path / "file", "text")
    inode = (tmp_path / "file").stat().st_ino
    assert done.index(("fsync", inode)) < done.index(("replace", inode))
