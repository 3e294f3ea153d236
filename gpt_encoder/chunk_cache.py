"""ChunkCache: encode short texts by look-up of whole chunks, without NumPy. `arrays/` encodes long texts if NumPy is there.

It knows where GPT-2's split pattern can never join two characters, and nothing of the merge rule.

**Why a cut changes no ids.** The pattern matches from left to right and never looks back: each piece starts where the
previous one ends. A non-space before a space always ends a piece, because no piece contains a non-space followed by a
space. In a run of spaces the pattern looks one character ahead: if a non-space follows, `\\s+(?!\\S)` matches the run
without its last character. So two cuts are allowed: before a run of spaces (both paths do this), and in the middle of a run
of exactly two spaces before a non-space (only the fast path does this). There are no other cuts.

Space means `\\s` of `regex`, which is Unicode's White_Space. `\\s` of `re` also contains U+001C to U+001F, which are symbols
for the pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

Ids = tuple[int, ...]

# A chunk is a run of spaces and the run of non-spaces that follows it.
CHUNK_PATTERN = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+")

_BLOCK_END = re.compile(r"\S(?=[ \n])")

# The fast path needs blocks in which blanks and line ends are the only spaces, in runs of at most two. Every run of three
# begins or ends with one of these pairs. Most blocks contain none of them, which saves the eight searches for runs of three.
_PAIRS = ("\n\n", " \n", "  ")
_RUNS_OF_THREE = tuple(a + b + c for a in " \n" for b in " \n" for c in " \n")
_OTHER_ASCII_SPACES = "\t\x0b\x0c\r"


@dataclass(frozen=True)
class CacheLimits:
    """How much text is encoded at a time, and how much is cached. No limit changes the ids."""

    # Characters per block. A block ends where a chunk ends; one of the default length fits the processor's cache.
    block_length: int = 8192
    # Entries of each of the two tables. A full table is cleared, because counting uses would cost more than refilling it.
    # Full of English, the two tables together take less than 100 MB.
    n_entries: int = 1 << 18
    # Maximum length of an entry, in characters.
    entry_length: int = 64


_DEFAULT_LIMITS = CacheLimits()


def blocks(text: str, length: int) -> Iterator[str]:
    """`text` in parts of at least `length` characters, each of which ends at the end of a chunk."""
    start = 0
    while start < len(text):
        end = _BLOCK_END.search(text, start + length) if start + length < len(text) else None
        yield (block := text[start : end.end()] if end else text[start:])
        start += len(block)


class ChunkCache:
    """Encodes text with `split` (text to pieces) and `merge` (one piece to its ids), and caches the ids.

    `chunks` contains the ids of chunks and pieces. `words` contains the ids of the keys of the fast path: chunks without
    their leading blank, or with a leading line end.
    """

    def __init__(
        self, split: Callable[[str], list[str]], merge: Callable[[str], Ids], limits: CacheLimits = _DEFAULT_LIMITS
    ) -> None:
        self.chunks = _Chunks(split, merge, limits)
        self.words = _Words(self.chunks, limits)
        self._block_length = limits.block_length

    def encode(self, text: str) -> list[int]:
        """The ids of `text`: those of `merge` for each piece of `split(text)`."""
        ids: list[int] = []
        for block in blocks(text, self._block_length):
            ids += chain.from_iterable(self._encode_plain(block) if is_plain(block) else self._encode_any(block))
        return ids

    def _encode_any(self, block: str) -> map[Ids]:
        return map(self.chunks.__getitem__, CHUNK_PATTERN.findall(block))

    def _encode_plain(self, block: str) -> map[Ids]:
        """The same at twice the speed: `str.split` cuts before every blank and every line end."""
        words = block.replace("\n", " \n").split(" ")
        del words[0]  # the empty string before the block's first character, which is a blank or line end
        return map(self.words.__getitem__, words)


def is_plain(block: str) -> bool:
    """Whether `block` may be cut before every blank and line end."""
    if block[0] not in " \n" or block[-1].isspace():
        return False
    if any(pair in block for pair in _PAIRS) and any(run in block for run in _RUNS_OF_THREE):
        return False
    if block.isascii():
        return not any(space in block for space in _OTHER_ASCII_SPACES)
    return block.replace("\n", "").isprintable()  # so it has no other space: the blank is the only printable one


class _Table(dict[str, Ids]):
    def __init__(self, limits: CacheLimits) -> None:
        super().__init__()
        self._n_entries, self._entry_length = limits.n_entries, limits.entry_length

    def _remember(self, key: str, ids: Ids) -> Ids:
        if len(key) <= self._entry_length:
            if len(self) >= self._n_entries:
                self.clear()
            self[key] = ids
        return ids


class _Chunks(_Table):
    """The ids of chunks and pieces. They share a table because a piece that is split again stays one piece."""

    def __init__(self, split: Callable[[str], list[str]], merge: Callable[[str], Ids], limits: CacheLimits) -> None:
        super().__init__(limits)
        self._split = split
        self._merge = merge

    def __missing__(self, chunk: str) -> Ids:
        pieces = self._split(chunk)
        ids = self._merge(chunk) if len(pieces) == 1 else tuple(chain.from_iterable(map(self.__getitem__, pieces)))
        return self._remember(chunk, ids)


class _Words(_Table):
    """The ids of chunks as `str.split(" ")` leaves them: without the leading blank, or with a leading line end."""

    def __init__(self, chunks: _Chunks, limits: CacheLimits) -> None:
        super().__init__(limits)
        self._chunks = chunks

    def __missing__(self, word: str) -> Ids:
        return self._remember(word, self._chunks[word if word.startswith("\n") else " " + word])
