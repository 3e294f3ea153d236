"""The file of `--out`: results are appended in order, and an interrupted run goes on. It does not know what they contain.

`OUT.progress` stands beside `OUT`. Its first line says what was run; each further line is the size of `OUT` in bytes after
another prompt. A result is written before its line, so a killed process leaves at most some bytes too many in `OUT`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gpt_config.atomic_write import atomic_write_text
from gpt_config.errors import InputError, WriteError
from gpt_config.file_reading import check_regular, parse_json
from gpt_config.folder_lock import locked


class OutputFile:
    """The results of a run in a file. `n_done` is the number of prompts whose results it has."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read what an earlier run has left. InputError if the file exists and no such run has written it."""
        self._path = Path(path)
        if not self._path.name:
            raise InputError(f"{os.fspath(path)!r} is not the name of a file: name a file to write, such as results.jsonl")
        self._progress = self._path.with_name(f"{self._path.name}.progress")
        self.begun_with: Mapping[str, Any] | None = None
        self._sizes: list[int] = []
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self._open = contextlib.ExitStack()  # the files and the lock
        self._read()

    def _read(self) -> None:
        if self._path.exists():
            check_regular(self._path)
        size = self._path.stat().st_size if self._path.exists() else 0
        if self._progress.exists():
            self._read_progress(size)
        elif size:
            raise InputError(
                f"{self._path} exists, and there is no {self._progress} to go on from: choose another --out, or delete it"
            )

    @property
    def n_done(self) -> int:
        """How many prompts have their results in the file."""
        return len(self._sizes)

    def _read_progress(self, size: int) -> None:
        head, *lines = self._progress.read_bytes().split(b"\n")[:-1] or [b""]  # the last line may be incomplete
        try:
            self.begun_with = parse_json(head.decode())
            sizes = [int(line) for line in lines]
        except ValueError:
            self.begun_with, sizes = None, []
        if not isinstance(self.begun_with, dict) or sizes != sorted(map(abs, sizes)):
            raise InputError(f"{self._progress} is damaged: delete it and {self._path}, or choose another --out")
        self._sizes = [end for end in sizes if end <= size]

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Open the file to append results, until `close`. `settings` say what is run.

        InputError names a setting that an earlier run had not, or says that another process is writing the file.
        """
        if self.begun_with is not None:
            self._check(settings, self.begun_with)
        try:
            results = self._open.enter_context(open(self._path, "ab"))  # noqa: SIM115 - `close` closes it
            self._open.enter_context(locked(self._path))
        except BlockingIOError:
            raise InputError(f"another process is writing {self._path}: wait for it, or choose another --out") from None
        except OSError as error:
            raise self._write_error(error) from None
        self._read()  # again, because another process may have written until now
        if self.begun_with is None:
            atomic_write_text(self._progress, json.dumps(dict(settings)) + "\n")
        else:
            self._check(settings, self.begun_with)
        try:
            self._files = results, self._open.enter_context(open(self._progress, "ab"))  # noqa: SIM115
            # Repair what a killed process has left: bytes of a result without its line, and half a line.
            self._files[0].truncate(self._sizes[-1] if self._sizes else 0)
            lines = self._progress.read_bytes().split(b"\n")
            self._files[1].truncate(sum(len(line) + 1 for line in lines[: 1 + len(self._sizes)]))
        except OSError as error:
            raise self._write_error(error) from None

    def close(self) -> None:
        """Close the file, so that another process may write it."""
        self._open.close()

    def _check(self, settings: Mapping[str, Any], begun_with: Mapping[str, Any]) -> None:
        for name in [*settings, *begun_with]:
            before, now = begun_with.get(name), json.loads(json.dumps(settings.get(name)))
            if before != now:
                what = f"other {name.removeprefix('sha256 of ')}" if name.startswith("sha256") else f"{name} {before!r}"
                now_has = "" if name.startswith("sha256") else f", and this command has {now!r}"
                raise InputError(
                    f"{self._path} was begun with {what}{now_has}: repeat the first command, or choose another --out"
                )

    def result_of(self, place: int) -> bytes:
        """The result of the prompt at `place`, counted from 0, which is below `n_done`."""
        start = self._sizes[place - 1] if place else 0
        with open(self._path, "rb") as file:
            file.seek(start)
            return file.read(self._sizes[place] - start)

    def append(self, result: bytes) -> None:
        """Write the result of the next prompt. WriteError if the disk is full."""
        assert self._files is not None
        size = (self._sizes[-1] if self._sizes else 0) + len(result)
        try:
            for file, content in zip(self._files, (result, b"%d\n" % size), strict=True):
                file.write(content)
                file.flush()
        except OSError as error:
            raise self._write_error(error) from None
        self._sizes.append(size)

    def _write_error(self, error: OSError) -> WriteError:
        return WriteError(
            f"cannot write {self._path} ({error.strerror}): free disk space or choose another --out; "
            "the same command goes on from the last whole result"
        )
