"""How many threads a step uses, by what steps cost: fewer while other processes are busy, and all cores when they are not.

The threads of a product wait for each other by spinning. If another process has one of the cores, the thread that spins
holds the core that the late one needs, and a step takes 10 to 50 times as long as alone: with two cores and one busy process
beside it, one thread is much faster than two. `ThreadCount` decides from measured steps and knows neither torch nor a clock;
`step` measures and sets torch's number of threads, and restores it.

Results in float32 do not depend on the number of threads. Where repeated runs must agree to the last bit in any dtype,
`--threads N` or GPT2_THREADS=N fixes it: see `gpt_config.cores`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from gpt_config.cores import process_limit

# Seconds of a core that the calling thread has used. Windows counts them in steps of 16 ms, which are too long.
_has_thread_clock = time.get_clock_info("thread_time").resolution < 1e-4


@dataclass(frozen=True)
class TrialLimits:
    """When another number of threads is tried."""

    # Two steps in a row are slow if each takes this many times the usual time.
    slow: float = 2.0

    # A single step is slow if it takes this many times the usual time.
    very_slow: float = 8.0

    # A step is crowded if the calling thread had a core for less than this part of its time: on two cores 0.5 beside a busy
    # process, 0.97 to 1 alone. The first step of a kind, which has no usual time, is slow if it is crowded.
    crowded: float = 0.75

    # `slow` for a crowded step.
    slow_if_crowded: float = 1.4

    # Fewer threads are better if a step takes less than this part of the slow one.
    better: float = 0.9

    # More threads stay if this many steps in a row take less than this many times the usual time with fewer. Alone, they are
    # never much slower; beside a busy process they take twice as long or more, and only some steps are fast by chance.
    no_slower: float = 1.15
    steps_of_more: int = 3

    # Seconds until the next trial; doubled after each that failed, up to the longest.
    first_wait: float = 0.2
    longest_wait: float = 5.0

    # A trial that failed is not repeated before this many times the seconds that it lost.
    per_second_lost: float = 20.0


TRIAL_LIMITS = TrialLimits()


@dataclass
class _Wait:
    """When the next trial in one direction may begin, in seconds of measured steps."""

    limits: TrialLimits
    until: float = 0.0
    seconds: float = 0.0

    def end(self, until: float) -> None:
        """The last trial was a success: the next one may begin then."""
        self.until, self.seconds = until, 0.0

    def extend(self, now: float, lost: float) -> None:
        """The last trial failed, and took `lost` seconds longer than a step without it."""
        self.seconds = min(self.limits.longest_wait, max(self.limits.first_wait, 2 * self.seconds))
        self.until = now + max(self.seconds, self.limits.per_second_lost * lost)


@dataclass
class _Kind:
    """What is known of the steps of one kind: how many threads are best, and what a step costs per unit of work."""

    count: int
    too_many: int  # the smallest number that was slower than `count`; above the most if none is known
    fewer: _Wait  # when fewer threads may be tried
    more: _Wait
    latest: float = 0.0  # with `count` threads
    usual: dict[int, float] = field(default_factory=dict)  # by number of threads
    n_slow: int = 0  # steps in a row
    trial: int | None = None  # the number that is tried now
    n_better: int = 0  # steps of the trial that were


class ThreadCount:
    """The number of threads for the next step of some kind: `of(kind)`, from 1 to `most`. It learns from `measured`.

    If steps are slow, or the first of its kind is crowded, the next step runs with half as many threads; if that
    is faster, it stays so. While there are fewer than `most`, more are tried now and then, and stay unless they are slower:
    half of the way up to a number that was too slow, and from time to time all. Each kind has its own number, because
    decoding may wait for memory, which one core uses up, where a prompt is computed faster by all. A new kind begins with
    the last number that was chosen.

    >>> threads = ThreadCount(2)
    >>> threads.measured("decode", 0.7, share=0.5)  # beside a busy process
    >>> threads.of("decode")
    1
    """

    def __init__(self, most: int, limits: TrialLimits = TRIAL_LIMITS) -> None:
        self.most = most
        self.latest = most  # the last number that was chosen
        self._limits = limits
        self._kinds: dict[Hashable, _Kind] = {}
        self._now = 0.0  # seconds of all measured steps

    def of(self, kind: Hashable) -> int:
        """The number of threads for the next step of this kind."""
        known = self._kinds.get(kind)
        return self.latest if known is None else known.trial or known.count

    def measured(self, kind: Hashable, seconds: float, work: float = 1.0, *, share: float = 1.0) -> None:
        """A step has taken `seconds` with `of(kind)` threads. Steps of one `kind` cost the same per unit of `work`.

        `share`: the part of the time in which the calling thread had a core.
        """
        self._now += seconds
        known = self._kinds.get(kind)
        if known is None:
            known = self._kinds[kind] = self._new_kind()
        threads, cost = known.trial or known.count, seconds / work
        usual = known.usual.get(threads)
        if known.trial is not None:
            self._judge(known, known.trial, cost, work)
        else:
            known.latest = cost
            is_crowded = share < self._limits.crowded
            slow = self._limits.slow_if_crowded if is_crowded else self._limits.slow
            known.n_slow = known.n_slow + 1 if usual is not None and cost > slow * usual else 0
            is_slow = is_crowded if usual is None else known.n_slow > 1 or cost > self._limits.very_slow * usual
            if is_slow and known.count > 1 and self._now >= known.fewer.until:
                known.trial, known.n_better = max(1, known.count // 2), 0
            elif known.count < self.most and self._now >= known.more.until:
                known.trial, known.n_better = self._next_more(known), 0
        # It falls fast and rises slowly, so that a first step, which warms up, and slow ones do not count for long. If
        # it fell to the fastest step at once, the others would seem slow where steps vary by themselves.
        known.usual[threads] = cost if usual is None else usual + (0.5 if cost < usual else 0.1) * (cost - usual)

    def _new_kind(self) -> _Kind:
        waits = _Wait(self._limits), _Wait(self._limits, self._now + self._limits.first_wait)
        return _Kind(self.latest, self.most + 1, *waits)

    def _judge(self, kind: _Kind, trial: int, cost: float, work: float) -> None:
        """End a trial that failed, or was better often enough."""
        limits, is_more = self._limits, trial > kind.count
        before = kind.usual[kind.count] if is_more else kind.latest
        if cost >= (limits.no_slower if is_more else limits.better) * before:
            (kind.more if is_more else kind.fewer).extend(self._now, (cost - before) * work)
            kind.too_many = trial if is_more else kind.too_many
            kind.trial = None
            return
        kind.n_better += 1
        if is_more and kind.n_better < limits.steps_of_more:
            return
        if is_more:
            kind.more.end(self._now)
            kind.too_many = self.most + 1 if trial == self.most else kind.too_many
        else:
            kind.more.end(self._now + 2 * cost * work)  # soon, because it may have been only a moment
            kind.too_many = kind.count
        self.latest = kind.count = trial
        kind.latest, kind.trial = cost, None

    def _next_more(self, kind: _Kind) -> int:
        """Half of the way to what was too many; from where there is nothing between, all."""
        between = (kind.count + kind.too_many) // 2
        return between if between > kind.count else self.most


_counts: dict[int, ThreadCount] = {}  # by the most threads that a caller allows


class _Active(threading.local):
    """What decides now, in this Python thread; None outside of `adjusted_threads`."""

    count: ThreadCount | None = None
    n_measured: int = 0  # steps


_active = _Active()

# Python threads that compute at once share a ThreadCount, so that what one learns the others use.
_measuring = threading.Lock()


@contextmanager
def adjusted_threads(device: torch.device) -> Iterator[None]:
    """Compute what is within with as many threads as pay now, and restore torch's number afterwards.

    The most threads are what torch is set to, or the cores that this process may use if these are fewer. On another device
    than a CPU nothing is changed.
    """
    before = torch.get_num_threads()
    limit = process_limit()
    if device.type != "cpu" or _active.count is not None or (before == 1 and not limit.is_fixed):
        yield
        return
    if limit.is_fixed:
        count = ThreadCount(limit.count)
    else:
        most = min(before, limit.count)
        count = _counts.setdefault(most, ThreadCount(most))
    _active.count = count
    _set_threads(count.latest)
    try:
        yield
    finally:
        _active.count = None
        _set_threads(before)


@contextmanager
def step(kind: Hashable, device: torch.device, work: float = 1.0) -> Iterator[None]:
    """A step within `adjusted_threads`, which it measures. Steps of one `kind` cost the same per unit of `work`.

    If there are steps within it, they are measured instead.
    """
    with adjusted_threads(device):
        count = _active.count
        if count is None or process_limit().is_fixed:
            yield
            return
        n_threads = count.of(kind)
        _set_threads(n_threads)
        n_measured, start, used = _active.n_measured, time.perf_counter(), time.thread_time()
        yield
        seconds, used = time.perf_counter() - start, time.thread_time() - used
        if _active.n_measured == n_measured:
            _active.n_measured += 1
            with _measuring:
                if count.of(kind) == n_threads:  # otherwise another Python thread has begun or ended a trial since
                    count.measured(kind, seconds, work, share=used / seconds if _has_thread_clock else 1.0)
            _set_threads(count.of(kind))


def _set_threads(count: int) -> None:
    if count != torch.get_num_threads():  # to set the same number again made a prompt 8% slower
        torch.set_num_threads(count)


def thread_report() -> str:
    """How many threads steps use now, and why: "2 threads (the machine has 2 cores)"."""
    limit, torch_threads = process_limit(), torch.get_num_threads()
    if limit.is_fixed:
        return _worded(limit.count, limit.reason)
    most = min(torch_threads, limit.count)
    reason = limit.reason if limit.count <= torch_threads else f"torch is set to {torch_threads}"
    count = _counts[most].latest if most in _counts else most
    if count < most:
        reason = f"of {most}, because other processes use the cores"
    return _worded(count, reason)


def _worded(count: int, reason: str) -> str:
    return f"{count} thread{'s' if count > 1 else ''} ({reason})"
