"""TextCutter: split a window of text, or many texts, into pieces and parts of pieces. It knows no ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from gpt_encoder.arrays import Flags, Numbers
from gpt_encoder.arrays.character_cuts import CharacterCuts
from gpt_encoder.arrays.piece_starts import LOOK_AHEAD, TEXT_END, piece_starts

Tokens: TypeAlias = Callable[[], Iterable[bytes]]

_TEXT_END = bytes([TEXT_END])
_ALL_BUT_BEYOND_ASCII = bytes(range(0x80)) + _TEXT_END


class Parts(NamedTuple):
    """Parts of texts: part i is the `lengths[i]` bytes of `data` that start at `begins[i]`."""

    data: bytes
    begins: Numbers
    lengths: Numbers

    def some(self, which: slice | Numbers) -> Parts:
        """The parts with the indices `which`, with the same data."""
        return Parts(self.data, self.begins[which], self.lengths[which])


class TextCutter:
    """Cuts text where GPT-2's pattern does, and between characters that no token spans.

    `tokens` returns the bytes of all tokens beyond ASCII that merges make. It is called once, when the texts so far have
    `worth_cuts` characters beyond ASCII. For fewer, merging whole pieces is faster than building the tables for the cuts.
    """

    def __init__(self, tokens: Tokens, worth_cuts: int) -> None:
        self._tokens = tokens
        self._worth_cuts = worth_cuts
        self._cuts: CharacterCuts | None = None
        self._n_beyond_ascii = 0

    def cut_window(self, window: str, *, is_last: bool) -> tuple[Parts, int]:
        """The parts of a window of text, and the number of its characters that they cover.

        The last window of a text is covered completely. In other windows the last piece is left out, because the text that
        follows may extend it. Raises UnicodeEncodeError for a surrogate.
        """
        data = window.encode("utf-8")
        begins_character, starts_piece, starts_part = self._cut(data, is_ascii=window.isascii())
        n_characters = len(window) if is_last else _last_sure(starts_piece)
        n_bytes = n_characters if begins_character is None else len(window[:n_characters].encode("utf-8"))
        begins = _places(begins_character, starts_part)
        begins = begins[: np.searchsorted(begins, n_bytes)]
        return Parts(data, begins, np.diff(begins, append=n_bytes)), n_characters

    def cut_texts(self, texts: Sequence[str]) -> tuple[Parts, Numbers]:
        """The parts of all texts, and the number of parts of each text (N,). Raises UnicodeEncodeError for a surrogate."""
        data = b"".join(text.encode("utf-8") + _TEXT_END for text in texts)
        begins_character, _, starts_part = self._cut(data, is_ascii=all(map(str.isascii, texts)))
        begins = _places(begins_character, starts_part)
        lengths = np.diff(begins, append=len(data))
        is_end = np.frombuffer(data, np.uint8)[begins] == TEXT_END
        n_parts = np.diff(np.flatnonzero(is_end), prepend=-1) - 1
        return Parts(data, begins[~is_end], lengths[~is_end]), n_parts

    def _cut(self, data: bytes, *, is_ascii: bool) -> tuple[Flags | None, Flags, Flags]:
        """Three arrays of flags: bytes that start a character (None: all do), characters that start a piece, and a part."""
        first_bytes = np.frombuffer(data, np.uint8)
        if is_ascii:
            starts = piece_starts(first_bytes, np.empty(0, np.uint32))
            return None, starts, starts
        begins_character = first_bytes & 0xC0 != 0x80
        first_bytes = first_bytes[begins_character]
        beyond_ascii = data.translate(None, _ALL_BUT_BEYOND_ASCII)
        points = np.frombuffer(beyond_ascii.decode("utf-8").encode("utf-32-le"), "<u4")
        starts = piece_starts(first_bytes, points)
        if self._cuts is None:
            self._n_beyond_ascii += len(points)
            if self._n_beyond_ascii < self._worth_cuts:
                return begins_character, starts, starts
            self._cuts = CharacterCuts(self._tokens())
        return begins_character, starts, starts | self._cuts.starts(first_bytes, points)


def _last_sure(starts: Flags) -> int:
    """The index of the last start of a piece that does not depend on the text that follows; 0 if there is none."""
    sure = starts[:-LOOK_AHEAD]
    return len(sure) - 1 - int(np.argmax(sure[::-1])) if len(sure) else 0


def _places(begins_character: Flags | None, starts: Flags) -> Numbers:
    """The byte offsets of the characters at which `starts` is true."""
    if begins_character is None:
        return np.flatnonzero(starts)
    starts_of_bytes = np.zeros(len(begins_character), np.bool_)
    starts_of_bytes[begins_character] = starts
    return np.flatnonzero(starts_of_bytes)
