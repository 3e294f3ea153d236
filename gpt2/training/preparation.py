"""Encode texts into token files: learn a tokenizer if needed, encode in parallel, write train.bin and val.bin.

Depends on files and tokenizers, not on the model. Memory is bounded, because texts are processed in pieces.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2.training.corpus import Corpus, CorpusLimits, Piece, Split
from gpt2.training.token_file import FINGERPRINT_BYTES, TokenFile, TokenWriter, dtype_for
from gpt_config.cores import process_limit
from gpt_config.errors import ConfigError, DataError, GPT2Warning, TrainingError, VocabularyError
from gpt_config.validation import check_real
from gpt_encoder import CharTokenizer, load_tokenizer, train_bpe
from gpt_encoder.interface import Tokenizer

_BPE_VOCAB_SIZE = 4096  # tokens of a learned vocabulary, by default


@dataclass(frozen=True)
class PreparationLimits:
    """The sizes in which texts are cut and distributed to workers. They do not change the ids."""

    job_length: int = 1 << 20  # characters per job of a worker
    pieces: CorpusLimits = field(default_factory=CorpusLimits)


@dataclass(frozen=True)
class TrainingData:
    """The token files for training and validation, and the tokenizer that encoded both."""

    train: TokenFile
    validation: TokenFile
    tokenizer: Tokenizer

    @classmethod
    def open(cls, folder: str | Path) -> TrainingData:
        """Open what `prepare` wrote into `folder`, without reading the texts. DataError if a file is missing or damaged."""
        train, validation = (TokenFile.open(Path(folder) / name) for name in ("train.bin", "val.bin"))
        if train.fingerprint != validation.fingerprint:
            raise DataError(f"train.bin and val.bin in {folder} were not encoded together: encode the text again")
        return cls(train, validation, load_tokenizer(folder))


def prepare(
    data: Sequence[str | Path],
    folder: str | Path,
    *,
    tokenizer: str = "gpt2",
    vocab_size: int | None = None,
    validation_data: Sequence[str | Path] = (),
    validation_fraction: float = 0.1,
    text_field: str = "text",
    workers: int | None = None,
    limits: PreparationLimits | None = None,
) -> TrainingData:
    """Encode `data` into `folder`/train.bin and val.bin, write the tokenizer's files there too, and return what was written.

    `tokenizer` is "char", "bpe" (learns a vocabulary of `vocab_size` tokens from the data), or the name or folder of a
    tokenizer. Without `validation_data`, `validation_fraction` of `data` is held out for validation: see `Split`. Existing
    files are used again if texts (paths, sizes, modification times) and options are the same. DataError if there is no text.
    """
    folder, limits = Path(folder), limits or PreparationLimits()
    if not validation_data:
        check_real("validation_fraction", validation_fraction, lambda f: 0 < f < 1, "between 0 and 1")
    if vocab_size is not None and tokenizer != "bpe":
        raise ConfigError(f"vocab_size={vocab_size} needs a learned vocabulary: set tokenizer=bpe, or leave vocab_size out")
    corpus, validation = (Corpus(paths, text_field, limits.pieces) for paths in (data, validation_data))
    recipe = [tokenizer, vocab_size, validation_fraction, text_field, _state_of(corpus), _state_of(validation)]
    fingerprint = hashlib.sha256(json.dumps(recipe).encode()).digest()[:FINGERPRINT_BYTES]
    ready = _ready(folder, fingerprint)
    if ready is not None:
        return ready
    made = _make_tokenizer(tokenizer, vocab_size, corpus, validation)
    made.save_pretrained(folder)
    split = Split(0.0, None) if validation_data else Split.of(corpus, validation_fraction)
    sides = chain(split.sides(corpus), ((True, piece) for piece in validation.pieces()))
    with ExitStack() as stack:
        writers = {
            side: stack.enter_context(TokenWriter(folder / name, made.vocab_size, fingerprint))
            for side, name in ((False, "train.bin"), (True, "val.bin"))
        }
        for side, ids, n_bytes in _encoded(_jobs(sides, limits.job_length), made, workers or process_limit().count):
            writers[side].append(ids, n_bytes)
    replaced = corpus.replaced_bytes + validation.replaced_bytes
    if replaced:
        warnings.warn(f"{replaced} bytes of the data are not UTF-8: each became U+FFFD", GPT2Warning, 2)
    return TrainingData.open(folder)


def _state_of(corpus: Corpus) -> list[tuple[str, int, int]]:
    """Return path, size and modification time of each file. DataError if a file is empty, because that is never intended."""
    state = []
    for path in corpus.files():
        status = path.stat()
        if status.st_size == 0:
            raise DataError(f"{path} is empty: name a file with text")
        state.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
    return state


def _ready(folder: Path, fingerprint: bytes) -> TrainingData | None:
    try:
        data = TrainingData.open(folder)
    except (DataError, VocabularyError):
        return None
    return data if data.train.fingerprint == fingerprint else None


def _make_tokenizer(name: str, vocab_size: int | None, corpus: Corpus, validation: Corpus) -> Tokenizer:
    if name not in ("char", "bpe"):
        return load_tokenizer(name)
    texts = (piece.text for source in (corpus, validation) for piece in source.pieces())
    if name == "bpe":
        return train_bpe(texts, vocab_size or _BPE_VOCAB_SIZE)
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise DataError(f"{corpus.files()[0]} has no text: name a file with text")
    return CharTokenizer(characters)


class _Job(NamedTuple):
    is_validation: bool
    pieces: list[Piece]


def _jobs(sides: Iterable[tuple[bool, Piece]], length: int) -> Iterator[_Job]:
    """Yield jobs of pieces of one side: at least `length` characters per job, fewer only in the last job of each side."""
    waiting = {False: _Job(False, []), True: _Job(True, [])}
    lengths = {False: 0, True: 0}
    for side, piece in sides:
        waiting[side].pieces.append(piece)
        lengths[side] += len(piece.text)
        if lengths[side] >= length:
            yield waiting[side]
            waiting[side], lengths[side] = _Job(side, []), 0
    yield from (job for job in waiting.values() if job.pieces)


def _encoded(jobs: Iterator[_Job], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[bool, bytes, int]]:
    """Yield (side, ids, bytes of text) of each job, in order. The number of jobs in memory is limited."""
    first = [job for job, _ in zip(jobs, range(2), strict=False)]
    if len(first) < 2 or workers == 1:  # too little text to start processes
        for job in chain(first, jobs):
            yield job.is_validation, *_encode_pieces(tokenizer, job.pieces)
        return
    # A forked process inherits torch and the tokenizer. On other systems, each worker has to import them.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    under_way: deque[tuple[bool, Future[tuple[bytes, int]]]] = deque()
    with ProcessPoolExecutor(workers, context, _remember_tokenizer, (tokenizer,)) as pool:
        try:
            for job in chain(first, jobs):
                under_way.append((job.is_validation, _submit(pool, job)))
                if len(under_way) > workers + 1:
                    side, future = under_way.popleft()
                    yield side, *future.result()
            for side, future in under_way:
                yield side, *future.result()
        except BrokenProcessPool:
            raise TrainingError(
                "a process that encodes text was killed, perhaps because memory ran out: start again with fewer workers"
            ) from None


_tokenizer_of_worker: Tokenizer


def _remember_tokenizer(tokenizer: Tokenizer) -> None:
    global _tokenizer_of_worker
    _tokenizer_of_worker = tokenizer


def _submit(pool: Executor, job: _Job) -> Future[tuple[bytes, int]]:
    return pool.submit(_encode_in_worker, job.pieces)


def _encode_in_worker(pieces: list[Piece]) -> tuple[bytes, int]:
    return _encode_pieces(_tokenizer_of_worker, pieces)


def _encode_pieces(tokenizer: Tokenizer, pieces: list[Piece]) -> tuple[bytes, int]:
    """Return the ids of `pieces` as bytes, with an end-of-text id after each document, and the size of the text in bytes."""
    dtype, separator, n_bytes = dtype_for(tokenizer.vocab_size), tokenizer.eot_token_id, 0
    parts = []
    packed = tokenizer.encode_each_packed([text for text, _ in pieces])
    for (text, ends), ids in zip(pieces, packed, strict=True):
        parts.append(np.frombuffer(ids, np.uint32).astype(dtype).tobytes())
        n_bytes += len(text.encode("utf-8", errors="replace"))
        if ends and separator is not None:
            parts.append(np.array([separator], dtype).tobytes())
    return b"".join(parts), n_bytes
