"""train_bpe: learn byte-level merges from text (Sennrich et al. 2016, on bytes). It knows nothing of files or models."""

from __future__ import annotations

import heapq
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import regex

from gpt_config.errors import ConfigError, InputTypeError
from gpt_config.validation import check_whole
from gpt_encoder.byte_pair import Pair
from gpt_encoder.chunk_cache import CHUNK_PATTERN
from gpt_encoder.interface import EOT_TOKEN, mend_surrogates
from gpt_encoder.tokenizer import SPLIT_PATTERN, GPT2Tokenizer
from gpt_encoder.vocab_files import CHARACTER_OF_BYTE, Vocabulary


def train_bpe(texts: Iterable[str] | str, vocab_size: int, *, special_tokens: Sequence[str] = (EOT_TOKEN,)) -> GPT2Tokenizer:
    """Learn a vocabulary of `vocab_size` tokens from `texts`, which are read once and not kept.

    Ids are laid out as OpenAI's: 256 bytes, then merges in order of rank, then the special tokens. Text that spells a
    special token is a boundary and teaches nothing. The pair with the highest count merges first; of equal counts the
    pair of the lowest ids, so the result is a function of the texts' words. With too little text to fill the
    vocabulary it is smaller, and a warning says so. Text in which words are very long, such as DNA, takes time with the
    square of their length. ConfigError if `vocab_size` has no room for bytes and special tokens.

    >>> tokenizer = train_bpe(["low lower lowest"], vocab_size=260)
    >>> [tokenizer.decode([token]) for token in tokenizer.encode("lowest")]
    ['low', 'e', 's', 't']
    """
    if isinstance(special_tokens, str) or not isinstance(special_tokens, Sequence):
        raise InputTypeError(f"special_tokens={special_tokens!r} must be a list of texts")
    if not isinstance(texts, Iterable):
        raise InputTypeError(f"texts to learn from must be an iterable of str, not {type(texts).__name__}")
    for token in special_tokens:
        if not isinstance(token, str) or not token or token != mend_surrogates(token):
            raise InputTypeError(f"special token {token!r} must be a text of at least one character, without surrogates")
    check_whole(
        "vocab_size", vocab_size, 256 + len(special_tokens), f" (256 bytes and {len(special_tokens)} special tokens)"
    )
    if len(set(special_tokens)) != len(special_tokens):
        raise ConfigError(f"special_tokens={list(special_tokens)!r} names a token twice: name each once")
    pieces = _count_pieces([texts] if isinstance(texts, str) else texts, special_tokens)
    # CHARACTER_OF_BYTE is in the order of OpenAI's ids 0 to 255, which is not the order of the bytes.
    byte_ids = {byte: token_id for token_id, byte in enumerate(CHARACTER_OF_BYTE)}
    words = [[byte_ids[byte] for byte in piece.encode("utf-8")] for piece in pieces]
    pairs = _learn_merges(words, list(pieces.values()), vocab_size - 256 - len(special_tokens))

    tokens = list(CHARACTER_OF_BYTE.values())
    merges = []
    for left, right in pairs:
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    for token in special_tokens:
        if token in tokens:
            raise ConfigError(f"special token {token!r} is an ordinary token too: give it a text that no merge makes")
    tokens += special_tokens
    if len(tokens) < vocab_size:
        warnings.warn(
            f"the text has pairs for {len(tokens)} tokens only, not {vocab_size}: give more text or a smaller vocab_size",
            stacklevel=2,
        )
    token_ids = {token: token_id for token_id, token in enumerate(tokens)}
    return GPT2Tokenizer(Vocabulary(token_ids, merges, {token: token_ids[token] for token in special_tokens}))


def _count_pieces(texts: Iterable[str], special_tokens: Sequence[str]) -> Counter[str]:
    """How often each piece of the split pattern occurs. Chunks are counted first: each distinct one is split once."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    boundary = regex.compile("|".join(map(regex.escape, longest_first))) if special_tokens else None
    chunks: Counter[str] = Counter()
    for text in texts:
        if not isinstance(text, str):
            raise InputTypeError(f"texts to learn from must be str, not {type(text).__name__}: decode bytes first")
        for part in boundary.split(text) if boundary else [text]:
            chunks.update(CHUNK_PATTERN.findall(part))
    pieces: Counter[str] = Counter()
    for chunk, count in chunks.items():
        for piece in SPLIT_PATTERN.findall(mend_surrogates(chunk)):
            pieces[piece] += count
    return pieces


def _learn_merges(words: list[list[int]], counts: list[int], n_merges: int) -> list[Pair]:
    """The `n_merges` best pairs in turn. `words` are merged in place; only those that hold the pair are visited."""
    pair_counts: defaultdict[Pair, int] = defaultdict(int)
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)
    for at, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[at]
            words_with[pair].add(at)
    queue = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(queue)
    merges: list[Pair] = []
    while len(merges) < n_merges and queue:
        negative_count, pair = heapq.heappop(queue)
        if pair_counts[pair] != -negative_count:  # out of date: the count changed after this entry was made
            continue
        if not negative_count:
            break
        new_id = 256 + len(merges)
        merges.append(pair)
        changed: set[Pair] = set()
        for at in words_with.pop(pair):
            before, after = words[at], _merge_pair(words[at], pair, new_id)
            words[at] = after
            for old in pairwise(before):
                pair_counts[old] -= counts[at]
                changed.add(old)
            for new in pairwise(after):
                pair_counts[new] += counts[at]
                words_with[new].add(at)
                changed.add(new)
        for other in changed:
            heapq.heappush(queue, (-pair_counts[other], other))
    return merges


def _merge_pair(word: list[int], pair: Pair, new_id: int) -> list[int]:
    """`word` with all occurrences of `pair` replaced, from left to right."""
    left, right = pair
    merged: list[int] = []
    at = 0
    while at < len(word):
        if word[at] == left and at + 1 < len(word) and word[at + 1] == right:
            merged.append(new_id)
            at += 2
        else:
            merged.append(word[at])
            at += 1
    return merged
