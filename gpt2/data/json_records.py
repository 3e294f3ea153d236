"""Read JSON lines and JSON lists item by item, so that neither has to fit in memory. It does not know what items mean."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gpt2.data.source import Source
from gpt2.data.text import TextBlocks
from gpt_config.errors import DataError

_SPACE = " \t\r\n"
_NEAR_END = 16  # characters: an error so close to the end of what was read may be caused by that end


class NotJSON(Exception):
    """Why a line is not JSON."""


def json_lines(source: Source, encoding: str) -> Iterator[tuple[str, Any]]:
    """Yield ("line N", value) of each line that is not blank. The value is a `NotJSON` if the line cannot be parsed."""
    for number, line in enumerate(TextBlocks(source, encoding).lines(), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            value = NotJSON(str(error))
        yield f"line {number}", value


def json_list(source: Source, encoding: str) -> Iterator[tuple[str, Any]]:
    """Yield ("item N", value) of each item of a list. DataError if the file is not a JSON list."""
    reader = _ListReader(source, encoding)
    reader.expect("[", f"{source.name} is not a JSON list of records: put the records into a list, or one object per line")
    number, separator = 0, reader.next_character()
    while separator != "]":
        number += 1
        yield f"item {number}", reader.value(number)
        separator = reader.next_character()
        if separator == ",":
            reader.place += 1
        elif separator != "]":
            raise DataError(f"{source.name} is not JSON (no comma after item {number}): fix it")
    reader.place += 1
    if reader.next_character():
        raise DataError(f"{source.name} is not JSON (there is more after its list): write one list, or one object per line")


class _ListReader:
    """A window on the text of a JSON file: `text` from `place` on is still to be parsed."""

    def __init__(self, source: Source, encoding: str) -> None:
        self._name, self._blocks = source.name, iter(TextBlocks(source, encoding))
        self._decoder = json.JSONDecoder()
        self.text, self.place = "", 0

    def _more(self) -> bool:
        """Read at least as much again as is waiting, so that a long item is parsed few times."""
        parts, wanted = [self.text[self.place :]], len(self.text) - self.place
        n_read = 0
        for block in self._blocks:
            parts.append(block)
            n_read += len(block)
            if n_read and n_read >= wanted:
                break
        self.text, self.place = "".join(parts), 0
        return n_read > 0

    def next_character(self) -> str:
        """The next character that is not white space, without reading it; "" at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in _SPACE:
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._more():
                return ""

    def expect(self, character: str, message: str) -> None:
        found = self.next_character()
        if found != character:
            try:  # a file that is no JSON at all gets the reason of the parser
                self._decoder.raw_decode(self.text, self.place)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self._name} is not JSON ({error}): fix it, or name it .txt if it is a text") from None
            raise DataError(message)
        self.place += 1

    def value(self, number: int) -> Any:
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.place)
            except RecursionError:
                raise DataError(f"{self._name}, item {number}: its lists are too deep: fix it") from None
            except ValueError as error:
                at = getattr(error, "pos", 0)
                may_go_on = at >= len(self.text) - _NEAR_END or "Unterminated string" in str(error)
                if may_go_on and self._more():
                    continue
                raise DataError(f"{self._name} is not JSON (item {number}: {error}): fix it") from None
            if end == len(self.text) and self._more():  # a number may go on
                continue
            self.place = end
            return value
