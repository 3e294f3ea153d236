"""train_bpe: learn a byte-level BPE vocabulary from text (Sennrich et al. 2016). It knows nothing of files or models."""

from __future__ import annotations

import heapq
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from operator import add
from typing import NamedTuple

import regex

from gpt_config.errors import ConfigError, InputTypeError
from gpt_config.validation import check_whole
from gpt_encoder.byte_pair import Pair
from gpt_encoder.chunk_cache import CHUNK_PATTERN, blocks
from gpt_encoder.interface import EOT_TOKEN, mend_surrogates
from gpt_encoder.tokenizer import GPT2Tokenizer, split_pieces
from gpt_encoder.vocab_files import CHARACTER_OF_BYTE, Vocabulary

_BLOCK_LENGTH = 1 << 16
# The maximum number of distinct chunks in memory. Large texts have many more distinct chunks than pieces.
_CHUNKS_AT_ONCE = 1 << 18


class _Words(NamedTuple):
    """All distinct pieces of the training text."""

    texts: list[str]  # each character is an id (`_character`); merges change the list in place
    counts: list[int]  # occurrences of each piece


class _Pairs(NamedTuple):
    """All pairs of adjacent ids, each as a string of two characters."""

    counts: defaultdict[str, int]
    # The indices of the words that contain the pair. An index may occur twice, or be outdated by another merge.
    holders: defaultdict[str, list[int]]


def train_bpe(texts: Iterable[str] | str, vocab_size: int, *, special_tokens: Sequence[str] = (EOT_TOKEN,)) -> GPT2Tokenizer:
    """A tokenizer with a vocabulary of `vocab_size` tokens learned from `texts`, which are read once and not kept.

    Ids are laid out as in OpenAI's vocabulary: 256 bytes, then merges in order of rank, then the special tokens. The text of
    a special token splits the training text and is not learned. The most frequent pair is merged first; ties go to the pair
    with the lowest ids, so the result does not depend on the order of the texts.

    If the text has too few pairs, the vocabulary is smaller and a UserWarning is issued. The time is quadratic in the length
    of a word, which matters for texts with very long words, such as DNA.

    Raises ConfigError if `vocab_size` is too small for the bytes and the special tokens or a special token is given twice,
    and InputTypeError for texts or special tokens of the wrong type.

    >>> tokenizer = train_bpe(["low lower lowest"], vocab_size=260)
    >>> [tokenizer.decode([token]) for token in tokenizer.encode("lowest")]
    ['low', 'e', 's', 't']
    """
    if isinstance(special_tokens, str) or not isinstance(special_tokens, Sequence):
        raise InputTypeError(f"special_tokens={special_tokens!r} must be a list of str")
    if not isinstance(texts, Iterable):
        raise InputTypeError(f"training texts must be an iterable of str, not {type(texts).__name__}")
    for token in special_tokens:
        if not isinstance(token, str) or not token or token != mend_surrogates(token):
            raise InputTypeError(f"special token {token!r} must be a string of at least one character, without surrogates")
    check_whole(
        "vocab_size", vocab_size, 256 + len(special_tokens), f" (256 bytes and {len(special_tokens)} special tokens)"
    )
    if len(set(special_tokens)) != len(special_tokens):
        raise ConfigError(f"special_tokens={list(special_tokens)!r} names a token twice: name each once")
    pieces = _count_pieces([texts] if isinstance(texts, str) else texts, special_tokens)
    # CHARACTER_OF_BYTE is in the order of OpenAI's ids 0 to 255, which is not the order of the bytes.
    characters = {byte: _character(token_id) for token_id, byte in enumerate(CHARACTER_OF_BYTE)}
    words = [piece.encode("utf-8").decode("latin-1").translate(characters) for piece in pieces]
    pairs = _learn_merges(_Words(words, list(pieces.values())), vocab_size - 256 - len(special_tokens))

    tokens = list(CHARACTER_OF_BYTE.values())
    merges = []
    for left, right in pairs:
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    for token in special_tokens:
        if token in tokens:
            raise ConfigError(f"special token {token!r} is also an ordinary token: choose a text that no merge produces")
    tokens += special_tokens
    if len(tokens) < vocab_size:
        warnings.warn(
            f"the text has pairs for {len(tokens)} tokens only, not {vocab_size}: use more text or a smaller vocab_size",
            stacklevel=2,
        )
    token_ids = {token: token_id for token_id, token in enumerate(tokens)}
    return GPT2Tokenizer(Vocabulary(token_ids, merges, {token: token_ids[token] for token in special_tokens}))


def _count_pieces(texts: Iterable[str], special_tokens: Sequence[str]) -> Counter[str]:
    """The number of occurrences of each piece. Chunks are counted first, so that each distinct chunk is split only once."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    boundary = regex.compile("|".join(map(regex.escape, longest_first))) if special_tokens else None
    chunks: Counter[str] = Counter()
    pieces: Counter[str] = Counter()
    for text in texts:
        if not isinstance(text, str):
            raise InputTypeError(f"training texts must be str, not {type(text).__name__}: decode bytes first")
        for part in boundary.split(text) if boundary else [text]:
            for block in blocks(part, _BLOCK_LENGTH):
                chunks.update(CHUNK_PATTERN.findall(block))
                if len(chunks) > _CHUNKS_AT_ONCE:
                    _count_into(pieces, chunks)
                    chunks.clear()
    _count_into(pieces, chunks)
    return pieces


def _count_into(pieces: Counter[str], chunks: Mapping[str, int]) -> None:
    for chunk, count in chunks.items():
        for piece in split_pieces(chunk if chunk.isascii() else mend_surrogates(chunk)):
            pieces[piece] += count


def _learn_merges(words: _Words, n_merges: int) -> list[Pair]:
    """The `n_merges` best pairs in order, or fewer if no pair is left. The words are merged in place.

    Each merge visits only the words that contain the pair and recounts only the adjacent pairs. The count of a pair never
    grows after its ids exist. So the queue may contain outdated counts: each is corrected when it reaches the top.
    """
    pairs = _count_pairs(words)
    pair_counts = pairs.counts
    queue = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(queue)
    merges: list[Pair] = []
    while len(merges) < n_merges and queue:
        negative_count, pair = queue[0]
        count = pair_counts[pair]
        if count <= 0:  # it is negative for the rest of `aa` in `aaa` after `aa` is merged
            heapq.heappop(queue)
        elif count != -negative_count:
            heapq.heapreplace(queue, (-count, pair))
        else:
            heapq.heappop(queue)
            new = _character(256 + len(merges))
            merges.append((_id(pair[0]), _id(pair[1])))
            for other in _merge_in_words(words, pairs, pair, new):
                heapq.heappush(queue, (-pair_counts[other], other))
    return merges


def _count_pairs(words: _Words) -> _Pairs:
    counts: defaultdict[str, int] = defaultdict(int)
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for at, (word, count) in enumerate(zip(*words, strict=True)):
        for pair in map(add, word, word[1:]):
            counts[pair] += count
            holders[pair].append(at)
    return _Pairs(counts, holders)


def _merge_in_words(words: _Words, pairs: _Pairs, pair: str, new: str) -> set[str]:
    """Replace `pair` by `new` in all words and recount the adjacent pairs. Returns the new pairs."""
    texts, counts = words
    pair_counts, words_with = pairs
    made: set[str] = set()
    del pair_counts[pair]
    for holder in words_with.pop(pair):
        word, count = texts[holder], counts[holder]
        at = word.find(pair)
        while at >= 0:
            if at:
                left = word[at - 1]
                pair_counts[left + pair[0]] -= count
                pair_counts[left + new] += count
                words_with[left + new].append(holder)
                made.add(left + new)
            word = word[:at] + new + word[at + 2 :]
            if at + 1 < len(word):
                right = word[at + 1]
                pair_counts[pair[1] + right] -= count
                pair_counts[new + right] += count
                words_with[new + right].append(holder)
                made.add(new + right)
            at = word.find(pair, at + 1)
        texts[holder] = word
    return made


def _character(token_id: int) -> str:
    """The character for an id. Characters are in the order of the ids; surrogates are skipped."""
    return chr(token_id if token_id < 0xD800 else token_id + 0x800)


def _id(character: str) -> int:
    return ord(character) if character < "\ud800" else ord(character) - 0x800
