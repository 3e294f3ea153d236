"""ChunkCache: encode text by looking whole chunks up. It buys a tokenizer in Python the speed of one in Rust.

It knows where GPT-2's split pattern can never join two characters, and nothing of the merge rule.

**Why a cut changes no ids.** The pattern reads left to right, starts anew behind each piece and never looks back. Where a
non-space is followed by a space it always ends a piece, for no piece goes from the one to the other. Inside a run of
spaces it looks one character ahead: `\\s+(?!\\S)` takes the run but for its last character when a non-space follows. So a
run may be cut off in front (both paths do that), and a run of exactly two before a non-space may be cut in the middle
(the fast path does that too). Nothing else is cut. Space means `\\s` of `regex`, which is Unicode's White_Space.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from gpt_encoder.split_pattern import blocks

# Text is worked through in blocks that fit the processor's cache; a block ends where a chunk ends.
_BLOCK_LENGTH = 8192

# In a block of the fast path blanks and line ends are the only spaces, and at most two of them stand together.
_RUNS_OF_THREE = tuple(a + b + c for a in " \n" for b in " \n" for c in " \n")
_OTHER_ASCII_SPACES = "\t\x0b\x0c\r"

# At most so many pieces, and as many words, of at most so many characters; a full cache is emptied, for to keep count of
# uses would cost more than to fill it anew. Filled with English it measures under 100 MB.
_CACHED_CHUNKS = 1 << 18
_CACHED_LENGTH = 64

# To look known words up takes some hundredths of a second to prepare: only a text of many unlike pieces gains by it.
_WORTH_KNOWN_WORDS = 2000

# Ids are kept as the bytes of an array of these, 4 bytes each: bytes are joined faster than tuples are chained.
ID_TYPECODE: Final = "I"


class ChunkCache:
    """Encodes text with `split` (text to pieces), `cut` (a piece to parts) and `merge` (a part to its ids), and remembers
    what it encoded.

    `split` may give parts too: no merge joins two of them. `known_words` is called once, when there is enough text, for
    texts that are known to merge to one id.
    """

    def __init__(
        self,
        split: Callable[[str], list[str]],
        cut: Callable[[str], list[str]],
        merge: Callable[[str], Sequence[int]],
        known_words: Callable[[], Mapping[str, int]],
        block_length: int = _BLOCK_LENGTH,
    ) -> None:
        self._split = split
        self._pieces = _Pieces(cut, merge)
        self._words = _Words(split, self._pieces)
        self._known_words = known_words
        self._has_known_words = False
        self._block_length = block_length

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, equal to those of `merge` on each piece of `split(text)`."""
        ids: list[int] = []
        for packed in self.encode_packed(text):
            ids += memoryview(packed).cast(ID_TYPECODE).tolist()
        return ids

    def encode_packed(self, text: str) -> Iterator[bytes]:
        """The same ids as bytes of ID_TYPECODE, a block at a time."""
        for block in blocks(text, self._block_length):
            if not self._has_known_words and len(self._pieces) >= _WORTH_KNOWN_WORDS and block.isascii():
                self._learn_known_words()
            words = _words(block)
            if words is None:
                yield b"".join(map(self._pieces.__getitem__, self._split(block)))
            else:
                yield b"".join(map(self._words.__getitem__, words))

    def _learn_known_words(self) -> None:
        self._has_known_words = True
        known = self._known_words()
        if len(known) < _CACHED_CHUNKS // 2:
            # In order of rank: then the most frequent words lie close together in memory.
            packed = array(ID_TYPECODE, known.values()).tobytes()
            size = len(packed) // max(1, len(known))
            ids = [packed[at : at + size] for at in range(0, len(packed), size)]
            self._pieces.learn(dict(zip(known, ids, strict=True)))
            self._words.learn(
                {text[1:]: ids for text, ids in self._pieces.known.items() if text[0] == " " and text[1:].isalpha()}
            )


def _words(block: str) -> list[str] | None:
    """The chunks of `block` without their blanks, line ends kept; None where it is wrong to cut before each of these."""
    if block[0] not in " \n" or block[-1].isspace():
        return None
    if block.isascii():
        if any(space in block for space in _OTHER_ASCII_SPACES):
            return None
    elif not block.replace("\n", "").isprintable():  # of all spaces only the blank is printable
        return None
    spaced = block.replace("\n", " \n")
    # The first is a third space behind two line ends; all other runs of three have two blanks together now.
    if "\n \n " in spaced or ("  " in spaced and any(run in block for run in _RUNS_OF_THREE)):
        return None
    words = spaced.split(" ")
    del words[0]  # what stands before the blank or line end with which the block begins: nothing
    return words


class _Table(dict[str, bytes]):
    """Texts to their packed ids: what is `known` from the start, and what came up."""

    known: Mapping[str, bytes] = {}

    def learn(self, known: Mapping[str, bytes]) -> None:
        self.known = known
        self.update(known)

    def _remember(self, text: str, packed: bytes) -> bytes:
        if len(text) <= _CACHED_LENGTH:
            if len(self) >= _CACHED_CHUNKS:
                self.clear()
                self.update(self.known)
            self[text] = packed
        return packed


class _Pieces(_Table):
    """Pieces, and parts of them."""

    def __init__(self, cut: Callable[[str], list[str]], merge: Callable[[str], Sequence[int]]) -> None:
        super().__init__()
        self._cut = cut
        self._merge = merge

    def __missing__(self, piece: str) -> bytes:
        if piece.isascii() or len(parts := self._cut(piece)) == 1:
            packed = array(ID_TYPECODE, self._merge(piece)).tobytes()
        else:
            packed = b"".join(map(self.__getitem__, parts))
        return self._remember(piece, packed)


class _Words(_Table):
    """What `str.split(" ")` leaves of a chunk: a chunk without its blank, or with a line end in front."""

    def __init__(self, split: Callable[[str], list[str]], pieces: _Pieces) -> None:
        super().__init__()
        self._split = split
        self._packed_of_piece = pieces.__getitem__

    def __missing__(self, word: str) -> bytes:
        pieces = self._split(word if word[:1] == "\n" else " " + word)
        return self._remember(word, b"".join(map(self._packed_of_piece, pieces)))
