"""Encode many texts in several processes. It needs three methods of a tokenizer and knows nothing of how it encodes.

Texts are encoded in jobs of about half a megabyte; long texts are split into parts. A forked process has all texts and
receives only the number of its job; a spawned process receives the texts. Ids are returned as bytes, because sending a list
of ints takes longer than making it. A forked process returns them in shared memory.
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

# The maximum number of parts of texts in a job.
_JOB_PARTS = 1 << 14
# Fewer jobs than this are encoded in less time than processes need to start.
_WORTH_PROCESSES = 4
# Jobs queued per worker, so that none waits while this process makes lists.
_JOBS_AHEAD = 6
_ID_BYTES = 4


@dataclass(frozen=True)
class BatchSettings:
    """How texts are divided among processes. No setting changes the ids."""

    # Characters: a job is complete when it has this many.
    job_length: int = 1 << 19
    # Shared memory for the ids of one job, in bytes: enough for a job of the default length in any language. Ids that do not
    # fit are sent through a pipe. The system allocates the memory on the first write.
    slot_bytes: int = 4 << 20
    # A forked process has all texts. A spawned process has none, so its texts are sent to it.
    start_method: Literal["fork", "spawn"] = "fork" if sys.platform == "linux" else "spawn"


_DEFAULT_SETTINGS = BatchSettings()


class BatchTokenizer(Protocol):
    """The methods of a tokenizer that this module needs; every `gpt_encoder.Tokenizer` has them."""

    def special_parts(self, text: str, allowed: Mapping[str, int]) -> list[str | int]:
        """`text` split at the special tokens in `allowed`, which are replaced by their ids."""

    def encode_each_packed(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text as the bytes of an array of 32-bit unsigned ints. No special token is recognized."""

    def unpack_each(self, packed: bytes | memoryview, counts: Sequence[int]) -> list[list[int]]:
        """The ids of each text as a list. `packed`: the ids of all texts; `counts`: the number of ids of each text."""


class _Job(NamedTuple):
    """Parts of texts, each of which is the id of a special token or a string.

    The parent process makes rows from `numbers` and `token_ids` without access to the strings. An access changes the
    reference count in the string, and the first write after a fork to a page of 4 KiB copies the page.
    """

    numbers: array[int]  # for each part, the index of its text
    token_ids: dict[int, int]  # part -> id, for the parts that are special tokens
    texts: list[str]  # the other parts, in order


# Memory in which a worker returns ids. Ids that do not fit are sent through a pipe.
_Slot: TypeAlias = mmap.mmap | bytearray


class _Encoded(NamedTuple):
    """The ids of a job."""

    counts: list[int]  # the number of ids of each text
    ids: bytes  # the ids of all texts as 32-bit ints; empty if they are in the slot


class _JobUnderWay(NamedTuple):
    job: _Job
    slot: int | None
    encoded: Future[_Encoded]


@collector_paused(made_is_old=True)  # otherwise all lists are scanned again each time their number has grown by 25%
def encode_in_processes(
    tokenizer: BatchTokenizer,
    texts: Iterable[str],
    allowed: Mapping[str, int],
    n_workers: int,
    settings: BatchSettings | None = None,
) -> list[list[int]]:
    """The ids of each text, in the order of `texts`, encoded by this process and `n_workers` - 1 others.

    `allowed` maps the texts of the special tokens to recognize to their ids. Raises InputError if a worker is killed.
    """
    settings = settings or _DEFAULT_SETTINGS
    rows: list[list[int]] = []
    jobs = _jobs(tokenizer, texts, allowed, rows, settings.job_length)
    first = list(islice(jobs, _WORTH_PROCESSES))
    # A worker of another pool starts no processes: the other workers use the other cores, and it may not be allowed to.
    if n_workers == 1 or len(first) < _WORTH_PROCESSES or multiprocessing.parent_process() is not None:
        for job in chain(first, jobs):
            _add(tokenizer, rows, job, *_encode(tokenizer, job.texts))
        return rows
    before_fork = first.pop(0)  # encoded first, so that forked processes inherit what the tokenizer loads and caches
    _add(tokenizer, rows, before_fork, *_encode(tokenizer, before_fork.texts))
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
                f"one of n_workers={n_workers} processes was killed, possibly because memory ran out: use fewer"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return rows


def new_slot(n_bytes: int) -> _Slot:
    """`n_bytes` of memory, shared with all processes forked later; an empty bytearray if the system does not allocate it.

    Shared memory is faster than a pipe, which copies the ids five times, in small parts.
    """
    try:
        return mmap.mmap(-1, n_bytes)
    except OSError:  # a system that does not overcommit memory
        return bytearray()


def _encoded_in_order(
    pool: ProcessPoolExecutor, slots: list[_Slot], tokenizer: BatchTokenizer, jobs: list[_Job], is_forked: bool
) -> Iterator[tuple[_Job, list[int], bytes | memoryview]]:
    """For each job: the job, the number of ids of each of its texts, and all ids, which are valid until the next job.

    While no slot is free, the workers have enough queued jobs, so this process encodes the next job itself.
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
    """All `texts` in jobs of about `job_length` characters. Adds an empty row to `rows` for each text."""
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
    """The ids of the special tokens in `text`, and the text between them in parts of about `job_length` characters."""
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
            rows[number] = row  # without a copy: most texts are a single part
