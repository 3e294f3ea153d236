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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2.training.corpus import Corpus, CorpusLimits, Piece, Split
from gpt2.training.token_file import FINGERPRINT_BYTES, TokenFile, TokenWriter, dtype_for
from gpt2.training.token_shards import bytes_of_ids, open_shard, split_by_name
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
    def open(cls, folder: str | Path, end_token_id: int | None = None) -> TrainingData:
        """Open what `prepare` wrote into `folder`, without reading the texts. DataError if a file is missing or damaged.

        `end_token_id` is that of `prepare`: the tokenizer's files do not say it.
        """
        train, validation = (TokenFile.open(Path(folder) / name) for name in ("train.bin", "val.bin"))
        if train.fingerprint != validation.fingerprint:
            raise DataError(f"train.bin and val.bin in {folder} were not encoded together: encode the text again")
        tokenizer = load_tokenizer(folder)
        tokenizer.end_token_id = end_token_id
        return cls(train, validation, tokenizer)


def prepare(
    data: Sequence[str | Path],
    folder: str | Path,
    *,
    tokenizer: str = "gpt2",
    vocab_size: int | None = None,
    validation_data: Sequence[str | Path] = (),
    validation_fraction: float = 0.1,
    text_field: str = "text",
    end_token_id: int | None = None,
    special_tokens: bool = False,
    add_tokens: Sequence[str] = (),
    workers: int | None = None,
    limits: PreparationLimits | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> TrainingData:
    """Encode `data` into `folder`/train.bin and val.bin, write the tokenizer's files there too, and return what was written.

    `tokenizer` is "char", "bpe" (learns a vocabulary of `vocab_size` tokens from the data), or the name or folder of a
    tokenizer. `end_token_id` follows each document; None: the tokenizer's end token. Without `validation_data`,
    `validation_fraction` of `data` is held out for validation: see `Split`. Existing files are used again if texts (paths,
    sizes, modification times) and options are the same. DataError if there is no text.

    `data` may also be files of token ids: see `gpt2.training.token_shards`. With `special_tokens`, special tokens of the
    tokenizer that a text spells become tokens; otherwise they are ordinary text, and a warning names one. `add_tokens` are
    new special tokens, which the tokenizer gets with new ids. `tell` gets lines on what is read: how many files of folders
    are left out, and how tables are separated.
    """
    folder, limits = Path(folder), limits or PreparationLimits()
    if not validation_data:
        check_real("validation_fraction", validation_fraction, lambda f: 0 < f < 1, "between 0 and 1")
    if vocab_size is not None and tokenizer != "bpe":
        raise ConfigError(f"vocab_size={vocab_size} needs a learned vocabulary: set tokenizer=bpe, or leave vocab_size out")
    corpus = Corpus(data, text_field, limits.pieces, apart=validation_data)
    validation = Corpus(validation_data, text_field, limits.pieces)
    recipe: list[object] = [
        tokenizer, vocab_size, validation_fraction, text_field, special_tokens, _state_of(corpus), _state_of(validation),
    ]  # fmt: skip
    recipe += [] if end_token_id is None else [end_token_id]
    recipe += [{"add_tokens": list(add_tokens)}] if add_tokens else []
    for line in corpus.listing().lines():
        tell(line)
    fingerprint = hashlib.sha256(json.dumps(recipe).encode()).digest()[:FINGERPRINT_BYTES]
    ready = _ready(folder, fingerprint, end_token_id)
    if ready is not None:
        return ready
    if corpus.holds_tokens():
        known = _known_tokenizer(corpus, tokenizer).with_special_tokens(add_tokens)
        known.end_token_id = end_token_id
        return _prepare_tokens(corpus, validation, folder, known, validation_fraction, fingerprint, tell)
    if validation_data and validation.holds_tokens():
        raise DataError(f"{validation.files()[0]} contains token ids and {corpus.files()[0]} text: name files of one kind")
    made = _make_tokenizer(tokenizer, vocab_size, corpus, validation).with_special_tokens(add_tokens)
    made.end_token_id = end_token_id
    split = Split(0.0, None) if validation_data else Split.of(corpus, validation_fraction)
    sides = chain(split.sides(corpus), ((True, piece) for piece in validation.pieces()))
    encoder = _Encoder(made, special_tokens)
    spelled: set[str] = set()
    with _writers(folder, made, fingerprint, corpus) as writers:
        for side, part in _encoded(_jobs(sides, limits.job_length), encoder, workers or process_limit().count):
            writers[side].append(part.ids, part.n_bytes)
            spelled |= part.spelled
    for line in (*corpus.notes, *validation.notes):
        tell(line)
    _warn_of_replaced(corpus.replaced_bytes + validation.replaced_bytes, corpus.replaced_halves + validation.replaced_halves)
    if spelled:
        warnings.warn(
            f"the text spells the special token {min(spelled)!r}, which is encoded as ordinary text: "
            "set special_tokens to encode it as the token",
            GPT2Warning,
            2,
        )
    return TrainingData.open(folder, end_token_id)


@contextmanager
def _writers(folder: Path, tokenizer: Tokenizer, fingerprint: bytes, corpus: Corpus) -> Iterator[dict[bool, TokenWriter]]:
    """The writers of train.bin (False) and val.bin (True). At the end, the tokenizer's files are written beside them.

    After an error, `folder` is as it was, and does not exist if it did not. DataError if a side has too few tokens.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with (
            TokenWriter(folder / "train.bin", tokenizer.vocab_size, fingerprint) as train,
            TokenWriter(folder / "val.bin", tokenizer.vocab_size, fingerprint) as validation,
        ):
            yield {False: train, True: validation}
            _check_side("training", train.n_tokens, "add text", corpus)
            _check_side("validation", validation.n_tokens, "add text, or set validation_data", corpus)
            tokenizer.save_pretrained(folder)
    except BaseException:
        with suppress(OSError):
            for path in new_folders:
                path.rmdir()
        raise


def _warn_of_replaced(n_bytes: int, n_halves: int) -> None:
    if n_bytes:
        warnings.warn(f"{n_bytes} bytes of the data are not UTF-8: each became U+FFFD", GPT2Warning, 3)
    if n_halves:
        warnings.warn(f"{n_halves} halves of surrogate pairs in JSON: each became U+FFFD", GPT2Warning, 3)


def _check_side(name: str, n_tokens: int, remedy: str, corpus: Corpus) -> None:
    """Raise DataError if a side has too few tokens to predict one."""
    if n_tokens < 2:
        raise DataError(f"{corpus.files()[0]}: the {name} text has {n_tokens} tokens, and at least 2 are needed: {remedy}")


def _prepare_tokens(
    corpus: Corpus,
    validation: Corpus,
    folder: Path,
    made: Tokenizer,
    fraction: float,
    fingerprint: bytes,
    tell: Callable[[str], None],
) -> TrainingData:
    """Copy token ids into train.bin and val.bin. Without validation files, the last `fraction` is for validation."""
    train, held_out = corpus.files(), validation.files()
    if held_out and not validation.holds_tokens():
        raise DataError(f"{corpus.files()[0]} contains token ids and {held_out[0]} text: name files of one kind")
    if not held_out:
        train, held_out = split_by_name(train)
        if held_out:
            tell(f"{held_out[0].name}{f' and {len(held_out) - 1} more' if held_out[1:] else ''} for validation, by name")
    shards = {False: [open_shard(path) for path in train], True: [open_shard(path) for path in held_out]}
    for shard in chain(*shards.values()):
        shard.check(made.vocab_size, "the tokenizer")
    n_tokens = sum(len(shard.tokens) for shard in shards[False])
    cut = n_tokens if held_out else max(1, min(n_tokens - 1, int(n_tokens * (1 - fraction))))
    sizes, dtype = bytes_of_ids(made.token_bytes, made.vocab_size, made.eot_token_id), dtype_for(made.vocab_size)
    with _writers(folder, made, fingerprint, corpus) as writers:
        place = 0
        for is_validation, shard in ((side, shard) for side, those in shards.items() for shard in those):
            for ids in shard.chunks():
                middle = len(ids) if is_validation else max(0, min(len(ids), cut - place))
                for side, part in ((is_validation, ids[:middle]), (True, ids[middle:])):
                    writers[side].append(part.astype(dtype).tobytes(), int(sizes[part].sum()))
                place += len(ids)
    return TrainingData.open(folder, made.end_token_id)


def _known_tokenizer(corpus: Corpus, name: str) -> Tokenizer:
    """The tokenizer of token ids. DataError for one that has to be learned from texts."""
    if name in ("char", "bpe"):
        raise DataError(
            f"{corpus.files()[0]} contains token ids, from which tokenizer={name} cannot learn a vocabulary: "
            "name the tokenizer that they belong to, or a text"
        )
    return load_tokenizer(name)


def _state_of(corpus: Corpus) -> list[tuple[str, int, int]]:
    """Return path, size and modification time of each file. DataError if a file is empty, because that is never intended."""
    state = []
    for path in corpus.files():
        status = path.stat()
        if status.st_size == 0:
            raise DataError(f"{path} is empty: name a file with text")
        state.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
    return state


def _ready(folder: Path, fingerprint: bytes, end_token_id: int | None) -> TrainingData | None:
    try:
        data = TrainingData.open(folder, end_token_id)
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


class _Part(NamedTuple):
    """The ids of a job as bytes, the size of its text in bytes, and the special tokens that it spells as ordinary text."""

    ids: bytes
    n_bytes: int
    spelled: frozenset[str]


@dataclass(frozen=True)
class _Encoder:
    """Encodes pieces. With `special_tokens`, a special token in a text becomes that token, as in transformers."""

    tokenizer: Tokenizer
    special_tokens: bool = False

    def __call__(self, pieces: Sequence[Piece]) -> _Part:
        """Return the ids of `pieces`, with an end-of-text id after each document."""
        tokenizer = self.tokenizer
        dtype, separator, n_bytes = dtype_for(tokenizer.vocab_size), tokenizer.eot_token_id, 0
        spelled = frozenset(token for token in tokenizer.special_tokens if any(token in text for text, _ in pieces))
        parts = []
        packed = self._packed([text for text, _ in pieces], spelled)
        for (text, ends), ids in zip(pieces, packed, strict=True):
            parts.append(np.frombuffer(ids, np.uint32).astype(dtype).tobytes())
            n_bytes += len(text.encode("utf-8", errors="replace"))
            if ends and separator is not None:
                parts.append(np.array([separator], dtype).tobytes())
        return _Part(b"".join(parts), n_bytes, frozenset() if self.special_tokens else spelled)

    def _packed(self, texts: list[str], spelled: Collection[str]) -> list[bytes]:
        if not self.special_tokens or not spelled:
            return self.tokenizer.encode_each_packed(texts)
        rows = (self.tokenizer.encode(text, allowed_special="all", add_special_tokens=False) for text in texts)
        return [np.array(row, np.uint32).tobytes() for row in rows]


def _encoded(jobs: Iterator[_Job], encoder: _Encoder, workers: int) -> Iterator[tuple[bool, _Part]]:
    """Yield (side, encoded part) of each job, in order. The number of jobs in memory is limited."""
    first = [job for job, _ in zip(jobs, range(2), strict=False)]
    if len(first) < 2 or workers == 1:  # too little text to start processes
        for job in chain(first, jobs):
            yield job.is_validation, encoder(job.pieces)
        return
    # A forked process inherits torch and the tokenizer. On other systems, each worker has to import them.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    under_way: deque[tuple[bool, Future[_Part]]] = deque()
    with ProcessPoolExecutor(workers, context, _remember_encoder, (encoder,)) as pool:
        try:
            for job in chain(first, jobs):
                under_way.append((job.is_validation, pool.submit(_encode_in_worker, job.pieces)))
                if len(under_way) > workers + 1:
                    side, future = under_way.popleft()
                    yield side, future.result()
            for side, future in under_way:
                yield side, future.result()
        except BrokenProcessPool:
            raise TrainingError(
                "a process that encodes text was killed, perhaps because memory ran out: start again with fewer workers"
            ) from None


_encoder_of_worker: _Encoder


def _remember_encoder(encoder: _Encoder) -> None:
    global _encoder_of_worker
    _encoder_of_worker = encoder


def _encode_in_worker(pieces: list[Piece]) -> _Part:
    return _encoder_of_worker(pieces)
