"""Added tokens: find them in a text and split the text there, as the library `tokenizers` does. It knows no files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# The property White_Space of Unicode. str.strip() would also remove U+001C to U+001F.
_SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


@dataclass(frozen=True)
class AddedToken:
    """A token that is found by its text before the rest of the text is split into pieces.

    A special one is found only if the caller allows it. `lstrip` and `rstrip`: the token includes the spaces before or after
    it. `single_word`: it is not found inside a word. `normalized`: it is found after those that are not.
    """

    text: str
    token_id: int
    is_special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


def split_at_tokens(text: str, tokens: Iterable[AddedToken]) -> list[str | int]:
    """`text` split at `tokens`, which are replaced by their ids. Of several tokens at one place the longest is taken."""
    found = [token for token in tokens if token.text in text]
    parts: list[str | int] = [text] if text else []
    for normalized in (False, True):
        group = {token.text: token for token in found if token.normalized is normalized}
        if group:
            longest_first = sorted(group, key=len, reverse=True)
            pattern = re.compile("|".join(map(re.escape, longest_first)))
            parts = [
                piece for part in parts for piece in ([part] if isinstance(part, int) else _split(part, pattern, group))
            ]
    return parts


def _split(text: str, pattern: re.Pattern[str], tokens: dict[str, AddedToken]) -> Iterator[str | int]:
    end = 0
    for match in pattern.finditer(text):
        token = tokens[match[0]]
        start, stop = match.span()
        if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])):
            continue
        if token.lstrip:
            start = end + len(text[end:start].rstrip(_SPACES))
        if token.rstrip:
            stop = len(text) - len(text[stop:].lstrip(_SPACES))
        if start > end:
            yield text[end:start]
        yield token.token_id
        end = stop
    if end < len(text):
        yield text[end:]


def _is_word(character: str) -> bool:
    return re.match(r"\w", character) is not None
