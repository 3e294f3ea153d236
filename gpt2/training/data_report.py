"""What encoded data consists of: documents, lengths, duplicates, and validation text that is also in the training text.

It reads token files in chunks, and rows of ids. It knows no text: two documents are equal if their ids are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2.training.preparation import TrainingData
from gpt2.training.token_shards import bytes_of_ids
from gpt_encoder.interface import Tokenizer

GRAM = 13  # tokens; the length that Brown et al. 2020 (appendix C) use for words
MOST_TOKENS = 200_000_000  # of a side that are looked at: about ten seconds
_MOST_VALIDATION_GRAMS = 1 << 22
_CHUNK = 1 << 20
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))


@dataclass(frozen=True)
class Side:
    """The documents of one side. Lengths are in tokens, without separators; `duplicates` equal an earlier document."""

    documents: int
    tokens: int
    bytes: int
    shortest: int
    median: int
    longest: int
    duplicates: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)


@dataclass(frozen=True)
class DataReport:
    """`shared_documents` of the validation documents are also whole training documents.

    `shared_grams` is the share, from 0 to 1, of the validation text's runs of 13 tokens that also are in the training text;
    None if no document has 13 tokens. `looked_at` is the number of tokens of a side that were compared at most.
    """

    training: Side
    validation: Side
    shared_documents: int
    shared_grams: float | None
    looked_at: int = MOST_TOKENS

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a dict that JSON can represent."""
        sides = {
            name: {**asdict(side), "bytes_per_token": side.bytes_per_token}
            for name, side in (("training", self.training), ("validation", self.validation))
        }
        return {**sides, "shared_documents": self.shared_documents, "shared_13_grams": self.shared_grams}

    def lines(self, name: str = "validation") -> list[str]:
        """Return the lines to show: on the training text, on the other side, which is called `name`, and on both."""
        lines = [f"{of}: {_described(side)}" for of, side in (("training", self.training), (name, self.validation))]
        grams = "" if self.shared_grams is None else f", and {self.shared_grams:.1%} of its runs of {GRAM} tokens"
        lines.append(
            f"of the {name} text, {self.shared_documents} of {self.validation.documents} documents{grams} are also in "
            "the training text"
        )
        if max(self.training.tokens, self.validation.tokens) > self.looked_at:
            lines.append(f"documents were counted and compared in the first {self.looked_at} tokens only")
        return lines


def _described(side: Side) -> str:
    documents = f"{side.documents} document{'' if side.documents == 1 else 's'}"
    lengths = f" of {side.shortest} to {side.longest} tokens (median {side.median})" if side.documents > 1 else ""
    twice = f"; {side.duplicates} are copies of others" if side.duplicates else ""
    return f"{side.tokens} tokens, {side.bytes_per_token:.2f} bytes per token, {documents}{lengths}{twice}"


class _Ids(NamedTuple):
    """Documents one after another. `end` is the id that separates them; None: there is one document."""

    tokens: NDArray[Any]
    n_bytes: int
    end: int | None
    n_tokens: int  # to state


def report_of(data: TrainingData, *, most_tokens: int = MOST_TOKENS) -> DataReport:
    """Return the report on token files. A tokenizer without an end-of-text token makes one document of each file."""
    end = data.tokenizer.eot_token_id
    training, validation = [_Ids(file.tokens, file.n_bytes, end, len(file)) for file in (data.train, data.validation)]
    return _report(training, validation, most_tokens)


def report_of_rows(
    training: Sequence[Sequence[int]], validation: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> DataReport:
    """Return the report on rows of ids, each of which is a document."""
    return _report(_joined(training, tokenizer), _joined(validation, tokenizer), MOST_TOKENS)


def _joined(rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> _Ids:
    n_tokens = sum(map(len, rows))
    tokens = np.fromiter((token_id for row in rows for token_id in (*row, -1)), np.int64, n_tokens + len(rows))
    sizes = bytes_of_ids(tokenizer.token_bytes, tokenizer.vocab_size, tokenizer.eot_token_id)
    return _Ids(tokens, int(sizes[tokens[tokens >= 0]].sum()), -1, n_tokens)


def _report(training: _Ids, validation: _Ids, most_tokens: int) -> DataReport:
    lengths, hashes = zip(*(_documents(ids, most_tokens) for ids in (training, validation)), strict=True)
    first, second = [_side(*parts) for parts in zip((training, validation), lengths, hashes, strict=True)]
    n_shared = int(np.isin(hashes[1], hashes[0]).sum())
    return DataReport(first, second, n_shared, _shared_grams(training, validation, most_tokens), most_tokens)


def _side(ids: _Ids, lengths: NDArray[np.int64], hashes: NDArray[np.uint64]) -> Side:
    if not len(lengths):
        return Side(0, ids.n_tokens, ids.n_bytes, 0, 0, 0, 0)
    shortest, median, longest = int(lengths.min()), int(np.median(lengths)), int(lengths.max())
    n_copies = len(hashes) - len(np.unique(hashes))
    return Side(len(lengths), ids.n_tokens, ids.n_bytes, shortest, median, longest, n_copies)


def _mixed(ids: NDArray[Any]) -> NDArray[np.uint64]:
    """64 bits for each id that look random (the finalizer of SplitMix64, Steele et al. 2014)."""
    state = (ids.astype(np.uint64) + np.uint64(1)) * _BASE
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = state ^ state >> np.uint64(31)
    return mixed


def _powers(base: np.uint64, count: int) -> NDArray[np.uint64]:
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)


def _documents(side: _Ids, most_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return the length and a 64-bit hash of each document: the sum over its ids of mixed(id) * base^place, modulo 2^64."""
    lengths, hashes = [], []
    chunk = min(_CHUNK, len(side.tokens))
    powers, inverses = _powers(_BASE, chunk), _powers(_INVERSE, chunk + 1)
    held_length, held_hash = 0, 0  # of the document that the last chunk did not end
    for start in range(0, min(len(side.tokens), most_tokens), _CHUNK):
        ids = side.tokens[start : min(start + _CHUNK, most_tokens)]
        ends = np.flatnonzero(ids == side.end) if side.end is not None else np.empty(0, np.int64)
        sums = np.concatenate([[np.uint64(0)], np.cumsum(_mixed(ids) * powers[: len(ids)], dtype=np.uint64)])
        begins, stops = np.concatenate([[0], ends + 1]), np.concatenate([ends, [len(ids)]])
        here = stops - begins
        of_part = (sums[stops] - sums[begins]) * inverses[begins]
        of_part[0] = np.uint64((held_hash + int(of_part[0]) * pow(int(_BASE), held_length, 1 << 64)) % (1 << 64))
        here[0] += held_length
        held_length, held_hash = int(here[-1]), int(of_part[-1])
        lengths.append(here[:-1])
        hashes.append(of_part[:-1])
    lengths.append(np.array([held_length], np.int64))
    hashes.append(np.array([held_hash], np.uint64))
    all_lengths, all_hashes = np.concatenate(lengths).astype(np.int64), np.concatenate(hashes)
    return all_lengths[all_lengths > 0], all_hashes[all_lengths > 0]


def _grams(side: _Ids, most_tokens: int) -> Iterator[NDArray[np.uint64]]:
    """Yield the hashes of all runs of 13 tokens that are within a document."""
    powers = _powers(_BASE, GRAM)
    n_tokens = min(len(side.tokens), most_tokens)
    for start in range(0, n_tokens - GRAM + 1, _CHUNK):
        ids = side.tokens[start : min(start + _CHUNK + GRAM - 1, n_tokens)]
        mixed = _mixed(ids)
        n_grams = len(ids) - GRAM + 1
        hashes = np.zeros(n_grams, np.uint64)
        for place, power in enumerate(powers):
            hashes += mixed[place : place + n_grams] * power
        if side.end is not None:
            n_ends = np.concatenate([[0], np.cumsum(ids == side.end)])
            hashes = hashes[n_ends[GRAM:] == n_ends[:-GRAM]]
        yield hashes


def _shared_grams(training: _Ids, validation: _Ids, most_tokens: int) -> float | None:
    """Return the share of the validation text's grams that are in the training text. Memory is bounded."""
    wanted = _first(_grams(validation, most_tokens), _MOST_VALIDATION_GRAMS)
    if not len(wanted):
        return None
    known, counts = np.unique(wanted, return_counts=True)
    bits = max(16, len(known).bit_length() + 4)
    may_be_known = np.zeros(1 << bits, bool)  # most hashes of the training text are ruled out by their first bits
    shift = np.uint64(64 - bits)
    may_be_known[known >> shift] = True
    found = np.zeros(len(known), bool)
    for hashes in _grams(training, most_tokens):
        candidates = hashes[may_be_known[hashes >> shift]]
        places = np.minimum(np.searchsorted(known, candidates), len(known) - 1)
        found[places[known[places] == candidates]] = True
    return float(counts[found].sum() / counts.sum())


def _first(parts: Iterator[NDArray[np.uint64]], limit: int) -> NDArray[np.uint64]:
    taken: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    for part in parts:
        taken.append(part[: limit - sum(map(len, taken))])
        if sum(map(len, taken)) >= limit:
            break
    return np.concatenate(taken)
