"""ChunkCache: encode short texts by looking whole chunks up, without NumPy. Long texts have `arrays/`, if it is there.

It knows where GPT-2's split pattern can never join two characters, and nothing of the merge rule.

**Why a cut changes no ids.** The pattern reads left to right, starts anew behind each piece and never looks back. Where a
non-space is followed by a space it always ends a piece, for no piece goes from the one to the other. Inside a run of
spaces it looks one character ahead: `\\s+(?!\\S)` takes the run but for its last character when a non-space follows. So a
run may be cut off in front (both paths do that), and a run of exactly two before a non-space may be cut in the middle
(the fast path does that too). Nothing else is cut. Space means `\\s` of `regex`, which is Unicode's White_Space; `\\s` of
`re` also holds U+001C to U+001F, which the pattern takes for symbols.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

Ids = tuple[int, ...]

# A chunk is a run of spaces with the run of non-spaces behind it.
CHUNK_PATTERN = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+")

_BLOCK_END = re.compile(r"\S(?=[ \n])")

# In a block of the fast path blanks and line ends are the only spaces, and at most two of them stand together. Every run
# of three begins or ends with one of these pairs; most blocks have none, and then eight searches need not be made.
_PAIRS = ("\n\n", " \n", "  ")
_RUNS_OF_THREE = tuple(a + b + c for a in " \n" for b in " \n" for c in " \n")
_OTHER_ASCII_SPACES = "\t\x0b\x0c\r"


@dataclass(frozen=True)
class CacheLimits:
    """How much text is encoded at a time, and how much is remembered. No limit changes the ids."""

    # Characters of a block, which ends where a chunk ends; a block of the default length fits the processor's cache.
    block_length: int = 8192
    # Entries of each of the two tables. A full table is emptied: counting uses would cost more than filling it again.
    # Filled with English, both tables together take less than 100 MB.
    n_entries: int = 1 << 18
    # Characters of the longest entry.
    entry_length: int = 64


_DEFAULT_LIMITS = CacheLimits()


def blocks(text: str, length: int) -> Iterator[str]:
    """`text` in parts of `length` characters and a few more, up to the end of a chunk."""
    start = 0
    while start < len(text):
        end = _BLOCK_END.search(text, start + length) if start + length < len(text) else None
        yield (block := text[start : end.end()] if end else text[start:])
        start += len(block)


class ChunkCache:
    """Encodes text with `split` (text to pieces) and `merge` (one piece to its ids), and remembers what it encoded.

    `chunks` holds the ids of chunks and pieces. `words` holds the ids of what the fast path looks up: chunks without their
    blank, or with a line end in front.
    """

    def __init__(
        self, split: Callable[[str], list[str]], merge: Callable[[str], Ids], limits: CacheLimits = _DEFAULT_LIMITS
    ) -> None:
        self.chunks = _Chunks(split, merge, limits)
        self.words = _Words(self.chunks, limits)
        self._block_length = limits.block_length

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, equal to those of `merge` on each piece of `split(text)`."""
        ids: list[int] = []
        for block in blocks(text, self._block_length):
            ids += chain.from_iterable(self._encode_plain(block) if is_plain(block) else self._encode_any(block))
        return ids

    def _encode_any(self, block: str) -> map[Ids]:
        return map(self.chunks.__getitem__, CHUNK_PATTERN.findall(block))

    def _encode_plain(self, block: str) -> map[Ids]:
        """The same at twice the speed: `str.split` finds the cuts, before every blank and before every line end."""
        words = block.replace("\n", " \n").split(" ")
        del words[0]  # the block begins with a blank or line end, and this is what stands before it: nothing
        return map(self.words.__getitem__, words)


def is_plain(block: str) -> bool:
    """Whether it is right to cut `block` before every blank and line end."""
    if block[0] not in " \n" or block[-1].isspace():
        return False
    if any(pair in block for pair in _PAIRS) and any(run in block for run in _RUNS_OF_THREE):
        return False
    if block.isascii():
        return not any(space in block for space in _OTHER_ASCII_SPACES)
    return block.replace("\n", "").isprintable()  # so no other space: of all spaces only the blank is printable


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
    """Chunks of text, and pieces, to their ids. A piece split again is one piece, so both can share a table."""

    def __init__(self, split: Callable[[str], list[str]], merge: Callable[[str], Ids], limits: CacheLimits) -> None:
        super().__init__(limits)
        self._split = split
        self._merge = merge

    def __missing__(self, chunk: str) -> Ids:
        pieces = self._split(chunk)
        ids = self._merge(chunk) if len(pieces) == 1 else tuple(chain.from_iterable(map(self.__getitem__, pieces)))
        return self._remember(chunk, ids)


class _Words(_Table):
    """What `str.split(" ")` leaves of a chunk to its ids: a chunk without its blank, or with a line end in front."""

    def __init__(self, chunks: _Chunks, limits: CacheLimits) -> None:
        super().__init__(limits)
        self._chunks = chunks

    def __missing__(self, word: str) -> Ids:
        return self._remember(word, self._chunks[word if word.startswith("\n") else " " + word])
