"""Files are opened only if they are regular, without waiting, and JSON of any depth is a value or a ValueError."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from gpt_config.file_reading import open_regular, parse_json, read_json, read_text, special_file


def test_a_regular_file_and_a_link_to_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf{}\r\n")
    (tmp_path / "link").symlink_to("a")
    assert read_text(tmp_path / "link", "utf-8-sig") == "{}\n" and read_json(tmp_path / "a", "utf-8-sig") == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_other_kinds_of_file_are_an_oserror_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening the pipe would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    (tmp_path / "file").write_text("")
    for name in ("pipe", "folder", "device", "socket"):
        with pytest.raises(OSError) as caught:
            open_regular(tmp_path / name)
        assert caught.value.strerror
        assert special_file(tmp_path, ("missing", "file", name)) == name
    assert special_file(tmp_path, ("missing", "file")) == ""
    with pytest.raises(OSError, match="null byte"):
        open_regular("a\0b")


@pytest.mark.parametrize("brackets", ["[]", "{}"])
@pytest.mark.parametrize("closed", [True, False])
def test_json_deeper_than_100_levels_is_a_value_error(brackets: str, closed: bool) -> None:
    opening, end = ("[", "]") if brackets == "[]" else ('{"a":', "}")
    for depth in (101, 500, 100_000):
        with pytest.raises(ValueError):
            parse_json(opening * depth + "1" + end * depth * closed)
    whole = opening * 100 + "1" + end * 100
    assert parse_json(whole) == json.loads(whole)
    assert parse_json("[" + "[1]," * 300 + "2]")[-1] == 2  # many lists, but not deep
