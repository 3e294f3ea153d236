"""A file of records, one JSON object per line, from which an interrupted run continues.

It does not know what a record contains. The fingerprints at the end tell models and data apart.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from gpt2.evaluation.items import Item
from gpt2.model import GPT2
from gpt_config.errors import DataError, WriteError
from gpt_config.json_text import to_json
from gpt_encoder.interface import Tokenizer


class ItemLog:
    """The records of items 0, 1, ... of one run, in `records`. Each line of the file also repeats `identity`.

    `identity` maps names such as "model" and "data" to fingerprints, so that two runs are never mixed in one file. If the
    last line was cut short by an interruption, it is removed. DataError if the file belongs to another run or is not an item
    log; the file is then left unchanged. WriteError if the file cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, str]) -> None:
        self.path = Path(path)
        self._identity = identity
        self.records: list[dict[str, Any]] = []
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            for number, line in enumerate(whole.splitlines()):
                self.records.append(self._record(line, number))
            if len(whole) < len(content):
                self._check_begun(content[len(whole) :])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(len(whole))
        except OSError as error:
            raise WriteError(f"cannot use {path} ({error.strerror}): name another file") from None

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add the records of the next items, as complete lines. WriteError if the file cannot be written."""
        records = list(records)
        lines = []
        for number, record in enumerate(records, len(self.records)):
            lines.append(to_json({"item": number, **self._identity, **record}, ensure_ascii=False) + "\n")
        try:
            with self.path.open("ab") as file:
                file.write("".join(lines).encode("utf-8"))
        except OSError as error:
            raise WriteError(
                f"cannot write {self.path} ({error.strerror}): free disk space and run the same command, which continues"
            ) from None
        self.records += records

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(line)
            if record.pop("item") != number:
                raise ValueError
            found = {name: record.pop(name) for name in self._identity}
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise DataError(f"{self.path}, line {number + 1} is not item {number} of a run: name another file") from None
        for name, fingerprint in self._identity.items():
            if found[name] != fingerprint:
                raise DataError(
                    f"{self.path} belongs to another {name} ({found[name]} instead of {fingerprint}): name another file"
                )
        return record

    def _check_begun(self, rest: bytes) -> None:
        if not rest.startswith(b'{"item": '[: len(rest)]):
            raise DataError(f"{self.path} is not an item log: name another file")


def model_fingerprint(model: GPT2, tokenizer: Tokenizer) -> str:
    """16 hexadecimal digits that change with the config, the weights, their dtype or the vocabulary."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr(model.config).encode())
    digest.update(repr(sorted(tokenizer.token_bytes.items())).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def data_fingerprint(items: Sequence[Item]) -> str:
    """16 hexadecimal digits that change with the prepared texts or the answers."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        digest.update(repr(item).encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()
