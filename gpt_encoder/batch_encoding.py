"""Encode many texts in several processes. It knows tokenizers by their interface, and nothing of how they encode.

Text goes to the workers in jobs of about a megabyte, long texts in parts; ids come back as bytes, since a list of ints
takes longer to send than to make.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from gpt_config.collector import collector_paused
from gpt_config.errors import InputError
from gpt_encoder.chunk_cache import blocks

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from gpt_encoder.interface import Tokenizer

_JOB_LENGTH = 1 << 19
_JOB_TEXTS = 1 << 14
# Fewer jobs than this are done before processes have started.
_WORTH_PROCESSES = 4
# Jobs that wait for each other process, so that it never waits while this one makes lists.
_JOBS_AHEAD = 6
# What a job or its ids take, and as many bytes as Linux, if it is not told otherwise, lets anyone have in a pipe.
_PIPE_SIZE = 1 << 20


class _Part(NamedTuple):
    """A part of the text with this number: ordinary text, or the id of a special token."""

    number: int
    content: str | int


_Job: TypeAlias = list[_Part]


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@collector_paused()  # each list would be looked through again whenever there are a quarter more of them
def encode_in_processes(
    tokenizer: Tokenizer, texts: Iterable[str], allowed: Mapping[str, int], n_workers: int
) -> list[list[int]]:
    """The ids of each of `texts`, in order, made by this process and `n_workers` - 1 others.

    Few jobs are under way at a time, whatever `texts` holds.
    """
    rows: list[list[int]] = []
    jobs = _jobs(_parts(tokenizer, texts, allowed, rows))
    first = list(islice(jobs, _WORTH_PROCESSES))
    # A worker of another pool has the other cores' work around it, and may not have processes of its own.
    if n_workers == 1 or len(first) < _WORTH_PROCESSES or multiprocessing.parent_process() is not None:
        for job in chain(first, jobs):
            _add(tokenizer, rows, job, tokenizer.encode_each_packed(_texts(job)))
        return rows
    # A forked process has the tokenizer already, with all that it remembers; elsewhere it starts anew.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(n_workers - 1, context, _remember, (tokenizer,)) as pool:
        _widen_pipes(pool)
        try:
            for job, encoded in _encoded_in_order(pool, tokenizer, chain(first, jobs), n_workers):
                _add(tokenizer, rows, job, encoded)
        except BrokenProcessPool:
            raise InputError(
                f"one of n_workers={n_workers} processes was killed, perhaps for want of memory: use fewer"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return rows


def _widen_pipes(pool: ProcessPoolExecutor) -> None:
    """Let a worker put down its ids at once and go on, and have its next text before it needs it.

    Through the 64 kB that a pipe holds both would go piece by piece, each when a thread of this process gets its
    turn: two processes were 1.3 times as fast as one, and are 1.5 times. The pipes are private to the pool; where they are
    missing, or of a kind that has one size, they stay as they are.
    """
    for queue in (getattr(pool, "_result_queue", None), getattr(pool, "_call_queue", None)):
        writer = getattr(queue, "_writer", None)
        if fcntl is not None and hasattr(fcntl, "F_SETPIPE_SZ") and writer is not None:
            with suppress(OSError):
                fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_SIZE)


def _encoded_in_order(
    pool: ProcessPoolExecutor, tokenizer: Tokenizer, jobs: Iterable[_Job], n_workers: int
) -> Iterator[tuple[_Job, list[bytes]]]:
    """Each job with what came of it. While the others have enough to do this process encodes too."""
    under_way: deque[tuple[_Job, Future[list[bytes]]]] = deque()
    for job in jobs:
        if sum(not future.done() for _, future in under_way) < _JOBS_AHEAD * (n_workers - 1):
            future = pool.submit(_encode_texts, _texts(job))
        else:
            future = Future()
            future.set_result(tokenizer.encode_each_packed(_texts(job)))
        under_way.append((job, future))
        while under_way and (under_way[0][1].done() or len(under_way) > 2 * _JOBS_AHEAD * n_workers):
            done, future = under_way.popleft()
            yield done, future.result()
    yield from ((done, future.result()) for done, future in under_way)


def _parts(tokenizer: Tokenizer, texts: Iterable[str], allowed: Mapping[str, int], rows: list[list[int]]) -> Iterator[_Part]:
    for number, text in enumerate(texts):
        rows.append([])
        for content in tokenizer.special_parts(text, allowed):
            if isinstance(content, int) or len(content) <= _JOB_LENGTH:
                yield _Part(number, content)
            else:
                yield from (_Part(number, block) for block in blocks(content, _JOB_LENGTH))


def _jobs(parts: Iterable[_Part]) -> Iterator[_Job]:
    job: _Job = []
    length = 0
    for part in parts:
        job.append(part)
        length += len(part.content) if isinstance(part.content, str) else 0
        if length >= _JOB_LENGTH or len(job) >= _JOB_TEXTS:
            yield job
            job, length = [], 0
    if job:
        yield job


_tokenizer_of_worker: Tokenizer


def _remember(tokenizer: Tokenizer) -> None:
    global _tokenizer_of_worker
    _tokenizer_of_worker = tokenizer


def _encode_texts(texts: list[str]) -> list[bytes]:
    return _tokenizer_of_worker.encode_each_packed(texts)


def _texts(job: _Job) -> list[str]:
    return [part.content for part in job if isinstance(part.content, str)]


def _add(tokenizer: Tokenizer, rows: list[list[int]], job: _Job, encoded: list[bytes]) -> None:
    rows_of_ids = iter(tokenizer.unpack_each(encoded))
    for number, content in job:
        ids = [content] if isinstance(content, int) else next(rows_of_ids)
        if rows[number]:
            rows[number] += ids
        else:
            rows[number] = ids  # no second copy of what most texts are, a single part
