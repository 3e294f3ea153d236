"""Encode many texts in several processes. It knows three methods of a tokenizer, and nothing of how it encodes.

Text is worked on in jobs of about half a megabyte, long texts in parts. A forked process has all texts, and is told which
job to do; elsewhere they are sent. Ids come back as bytes, since a list of ints takes longer to send than to make, and to
the process that forked through memory that both see.
"""

from __future__ import annotations

import mmap
import multiprocessing
import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, NamedTuple, Protocol, TypeAlias

from gpt_config.collector import collector_paused
from gpt_config.errors import InputError
from gpt_encoder.chunk_cache import blocks

_JOB_PARTS = 1 << 14
# Fewer jobs than this are done before processes have started.
_WORTH_PROCESSES = 4
# Jobs under way for each other process, so that it never waits while this one makes lists.
_JOBS_AHEAD = 6
_ID_BYTES = 4


@dataclass(frozen=True)
class BatchSettings:
    """How texts are divided among processes. No setting changes the ids."""

    # Characters: a job is complete when it has this many.
    job_length: int = 1 << 19
    # Memory for the ids of one job, shared by two processes: enough for a job of the default length in any language. If the
    # ids need more, they go through a pipe. The system provides the memory when it is first written.
    slot_bytes: int = 4 << 20
    # A forked process has all texts already. A spawned one starts empty, and texts are sent to it.
    start_method: Literal["fork", "spawn"] = "fork" if sys.platform == "linux" else "spawn"


_DEFAULT_SETTINGS = BatchSettings()


class BatchTokenizer(Protocol):
    """What this module needs of a tokenizer; every `gpt_encoder.Tokenizer` has it."""

    def special_parts(self, text: str, allowed: Mapping[str, int]) -> list[str | int]:
        """`text` with the ids of the special tokens in `allowed` in place of their texts."""

    def encode_each_packed(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as the bytes of an array of 32-bit unsigned ints. Nothing in the texts is special."""

    def unpack_each(self, packed: bytes | memoryview, counts: Sequence[int]) -> list[list[int]]:
        """The ids of each text as a list. `packed`: the ids of all texts; `counts`: how many each text has."""


class _Job(NamedTuple):
    """Parts of texts: of which text each is, and what they are: the ids of special tokens by their place, and the others.

    Rows are made without a look at the texts: Python counts who looks at a string in the string, and memory that is written
    to after a fork is copied first, 4 KiB at a time.
    """

    numbers: array[int]
    token_ids: dict[int, int]
    texts: list[str]


# Where a worker puts ids down. What has no room in it is sent.
_Slot: TypeAlias = mmap.mmap | bytearray


class _Encoded(NamedTuple):
    """How many ids each text of a job has, and all of them as 32-bit ints, unless they are in the slot."""

    counts: list[int]
    ids: bytes


class _JobUnderWay(NamedTuple):
    job: _Job
    slot: int | None
    encoded: Future[_Encoded]


@collector_paused(made_is_old=True)  # each list would be looked through again whenever there are a quarter more of them
def encode_in_processes(
    tokenizer: BatchTokenizer,
    texts: Iterable[str],
    allowed: Mapping[str, int],
    n_workers: int,
    settings: BatchSettings | None = None,
) -> list[list[int]]:
    """The ids of each of `texts`, in order, made by this process and `n_workers` - 1 others.

    `allowed`: the ids of the special tokens that are looked for, by their texts. InputError if a worker is killed.
    """
    settings = settings or _DEFAULT_SETTINGS
    rows: list[list[int]] = []
    jobs = _jobs(tokenizer, texts, allowed, rows, settings.job_length)
    first = list(islice(jobs, _WORTH_PROCESSES))
    # A worker of another pool has the other cores' work around it, and may not have processes of its own.
    if n_workers == 1 or len(first) < _WORTH_PROCESSES or multiprocessing.parent_process() is not None:
        for job in chain(first, jobs):
            _add(tokenizer, rows, job, *_encode(tokenizer, job.texts))
        return rows
    before_others = first.pop(0)  # what it loads and learns is then in all that are forked
    _add(tokenizer, rows, before_others, *_encode(tokenizer, before_others.texts))
    is_forked = settings.start_method == "fork"
    slots = [new_slot(settings.slot_bytes) if is_forked else bytearray() for _ in range(_JOBS_AHEAD * (n_workers - 1))]
    all_jobs = [*first, *jobs]
    context = multiprocessing.get_context(settings.start_method)
    to_remember = tokenizer, slots, all_jobs if is_forked else []
    with ProcessPoolExecutor(n_workers - 1, context, _remember, to_remember) as pool:
        try:
            for job, counts, ids in _encoded_in_order(pool, slots, tokenizer, all_jobs, is_forked):
                _add(tokenizer, rows, job, counts, ids)
        except BrokenProcessPool:
            raise InputError(
                f"one of n_workers={n_workers} processes was killed, perhaps for want of memory: use fewer"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return rows


def new_slot(n_bytes: int) -> _Slot:
    """`n_bytes` of memory, shared with the processes forked from now on; 0 bytes if the system does not provide them.

    Through a pipe ids would be copied five times, piece by piece.
    """
    try:
        return mmap.mmap(-1, n_bytes)
    except OSError:  # a system that promises no more memory than it has
        return bytearray()


def _encoded_in_order(
    pool: ProcessPoolExecutor, slots: list[_Slot], tokenizer: BatchTokenizer, jobs: list[_Job], is_forked: bool
) -> Iterator[tuple[_Job, list[int], bytes | memoryview]]:
    """Each job, how many ids each of its texts has, and all of them, which are gone when the next job is asked for.

    While no slot is free, the other processes have enough to do, and this one encodes too.
    """
    free = list(range(len(slots)))
    under_way: deque[_JobUnderWay] = deque()

    def finished(most_left: int) -> Iterator[tuple[_Job, list[int], bytes | memoryview]]:
        while under_way and (under_way[0].encoded.done() or len(under_way) > most_left):
            job, slot, encoded = under_way.popleft()
            counts, ids = encoded.result()
            if slot is None:
                yield job, counts, ids
            else:
                yield job, counts, ids or memoryview(slots[slot])[: _ID_BYTES * sum(counts)]
                free.append(slot)

    for number, job in enumerate(jobs):
        slot = free.pop() if free else None
        if slot is not None and is_forked:
            encoded = pool.submit(_encode_job_in_worker, number, slot)
        elif slot is not None:
            encoded = pool.submit(_encode_in_worker, job.texts, slot)
        else:
            encoded = Future()
            encoded.set_result(_encode(tokenizer, job.texts))
        under_way.append(_JobUnderWay(job, slot, encoded))
        yield from finished(most_left=2 * len(slots))
    yield from finished(most_left=0)


def _jobs(
    tokenizer: BatchTokenizer, texts: Iterable[str], allowed: Mapping[str, int], rows: list[list[int]], job_length: int
) -> Iterator[_Job]:
    """All `texts` in jobs of about `job_length` characters; an empty row for each text is added to `rows`."""
    job, length = _Job(array("Q"), {}, []), 0
    for number, text in enumerate(texts):
        rows.append([])
        for content in _split(tokenizer, text, allowed, job_length):
            if isinstance(content, int):
                job.token_ids[len(job.numbers)] = content
            else:
                job.texts.append(content)
                length += len(content)
            job.numbers.append(number)
            if length >= job_length or len(job.numbers) >= _JOB_PARTS:
                yield job
                job, length = _Job(array("Q"), {}, []), 0
    if job.numbers:
        yield job


def _split(tokenizer: BatchTokenizer, text: str, allowed: Mapping[str, int], job_length: int) -> Iterator[str | int]:
    """The ids of special tokens, and the text between them in parts that are not much longer than `job_length`."""
    for content in tokenizer.special_parts(text, allowed):
        if isinstance(content, int) or len(content) <= job_length:
            yield content
        else:
            yield from blocks(content, job_length)


_tokenizer_of_worker: BatchTokenizer
_slots_of_worker: list[_Slot]
_jobs_of_worker: list[_Job]


def _remember(tokenizer: BatchTokenizer, slots: list[_Slot], jobs: list[_Job]) -> None:
    global _tokenizer_of_worker, _slots_of_worker, _jobs_of_worker
    _tokenizer_of_worker, _slots_of_worker, _jobs_of_worker = tokenizer, slots, jobs


def _encode_job_in_worker(number: int, slot: int) -> _Encoded:
    return _encode_in_worker(_jobs_of_worker[number].texts, slot)


def _encode_in_worker(texts: list[str], slot: int) -> _Encoded:
    counts, ids = _encode(_tokenizer_of_worker, texts)
    memory = _slots_of_worker[slot]
    if len(ids) > len(memory):
        return _Encoded(counts, ids)
    memory[: len(ids)] = ids
    return _Encoded(counts, b"")


def _encode(tokenizer: BatchTokenizer, texts: list[str]) -> _Encoded:
    encoded = tokenizer.encode_each_packed(texts)
    return _Encoded([len(ids) // _ID_BYTES for ids in encoded], b"".join(encoded))


def _add(tokenizer: BatchTokenizer, rows: list[list[int]], job: _Job, counts: list[int], ids: bytes | memoryview) -> None:
    rows_of_ids = iter(tokenizer.unpack_each(ids, counts))
    for place, number in enumerate(job.numbers):
        row = [job.token_ids[place]] if place in job.token_ids else next(rows_of_ids)
        if rows[number]:
            rows[number] += row
        else:
            rows[number] = row  # no second copy of what most texts are, a single part
