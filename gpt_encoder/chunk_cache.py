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

# In a block of the fast path blanks and line ends are the only spaces, and at most two of them stand together. The first
# two runs of three are the only ones of text without trailing or double blanks, which are the other two that are looked for.
_PARAGRAPH_RUNS = ("\n\n\n", "\n\n ")
_OTHER_PAIRS = ("  ", " \n")
_OTHER_RUNS = tuple(a + b + c for a in " \n" for b in " \n" for c in " \n" if a + b + c not in _PARAGRAPH_RUNS)
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
            if _is_plain(block):  # `str.split` finds the cuts, before every blank and before every line end
                words = block.replace("\n", " \n").split(" ")
                del words[0]  # the block begins with a blank or line end, and this is what stands before it: nothing
                yield b"".join(map(self._words.__getitem__, words))
            else:
                yield b"".join(map(self._pieces.__getitem__, self._split(block)))

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


def _is_plain(block: str) -> bool:
    """Whether it is right to cut `block` before every blank and line end."""
    if block[0] not in " \n" or block[-1].isspace():
        return False
    if any(run in block for run in _PARAGRAPH_RUNS):
        return False
    if any(pair in block for pair in _OTHER_PAIRS) and any(run in block for run in _OTHER_RUNS):
        return False
    if block.isascii():
        return not any(space in block for space in _OTHER_ASCII_SPACES)
    return block.replace("\n", "").isprintable()  # so no other space: of all spaces only the blank is printable


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
        self._pieces = pieces

    def __missing__(self, word: str) -> bytes:
        chunk = word if word.startswith("\n") else " " + word
        return self._remember(word, b"".join(map(self._pieces.__getitem__, self._split(chunk))))
