"""Decode a source in blocks and lines of text, so that no file has to fit in memory. It does not know what text means."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

from gpt2.data.kind import not_utf_8, too_many_wrong
from gpt2.data.source import Source
from gpt_config.errors import DataError

BLOCK_BYTES = 1 << 20
# The characters to which the error handler "surrogateescape" decodes bytes that are not UTF-8.
_UNDECODED = re.compile(r"[\udc80-\udcff]")
_LINE_END = re.compile(r"\r\n|\n|\r")


def replaced(text: str) -> tuple[str, int]:
    """`text` with U+FFFD in place of each undecoded byte, and the number of them."""
    return (text, 0) if text.isascii() else _UNDECODED.subn("\ufffd", text)


class TextBlocks:
    """The decoded text of a source. A byte that is not UTF-8 is a lone surrogate (Python's "surrogateescape").

    A byte-order mark at the start of a line is not part of the text: files with marks are often joined. DataError if the
    source cannot be read, has NUL bytes, or has too many bytes that are not UTF-8.
    """

    def __init__(self, source: Source, encoding: str = "utf-8", block_bytes: int = BLOCK_BYTES) -> None:
        self._source, self._block_bytes = source, block_bytes
        # UTF-16 and UTF-32 have no handler that keeps undecoded bytes.
        errors = "surrogateescape" if encoding == "utf-8" else "replace"
        self._decoder = codecs.getincrementaldecoder(encoding)(errors)
        self._n_bytes = self._n_wrong = 0
        self._at_line_start = True

    def __iter__(self) -> Iterator[str]:
        with self._source.open() as stream:
            while block := stream.read(self._block_bytes):
                self._n_bytes += len(block)
                yield self._checked(self._decoder.decode(block))
        yield self._checked(self._decoder.decode(b"", final=True))

    def _checked(self, text: str) -> str:
        if "\0" in text:
            raise DataError(f"{self._source.name} is not text (it has NUL bytes): name a text, or convert it")
        if not text.isascii():
            self._n_wrong += len(_UNDECODED.findall(text))
            if too_many_wrong(self._n_wrong, self._n_bytes):
                raise DataError(f"{self._source.name} {not_utf_8(self._n_wrong, self._n_bytes)}")
            if "\ufeff" in text:
                text = re.sub("(?<=\n)\ufeff+", "", text.lstrip("\ufeff") if self._at_line_start else text)
        if text:
            self._at_line_start = text.endswith("\n")
        return text

    def lines(self) -> Iterator[str]:
        r"""Yield the lines, which end with "\n" only, with their ends."""
        parts: list[str] = []
        for block in self:
            *whole, rest = block.split("\n")
            for line in whole:
                yield "".join([*parts, line, "\n"])
                parts = []
            if rest:
                parts.append(rest)
        if parts:
            yield "".join(parts)

    def any_lines(self) -> Iterator[str]:
        r"""Yield the lines, which end with "\n", "\r\n" or "\r", with their ends, as the csv module needs them."""
        rest = ""
        for block in self:
            text = rest + block
            held = "\r" if text.endswith("\r") else ""  # the next block may begin with "\n"
            end = 0
            for found in _LINE_END.finditer(text, max(0, len(rest) - 1), len(text) - len(held)):
                yield text[end : found.end()]
                end = found.end()
            rest = text[end:]
        if rest:
            yield rest
