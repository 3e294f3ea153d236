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
from typing import NamedTuple

import torch

from gpt_config.cores import process_limit

try:
    import resource
except ModuleNotFoundError:  # Windows: steps are then compared with earlier ones only
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class TrialLimits:
    """When another number of threads is tried."""

    # A step that takes this many times its usual time is slow.
    slow: float = 2.0

    # In the first step of a kind, which has no usual time, the kernel took cores from its threads more often than this per
    # second. Beside a busy process it is 100 to 300; alone, a few.
    preemptions: float = 50.0

    # Another number of threads is better if a step takes less than this part of the time.
    better: float = 0.9

    # More threads must be better in this many steps in a row: beside a busy process some steps are fast by chance.
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

    def fail(self, now: float, lost: float) -> None:
        longer = max(self.limits.first_wait, 2 * self.seconds)
        self.seconds = min(self.limits.longest_wait, longer)
        self.until = now + max(self.seconds, self.limits.per_second_lost * lost)


class _Trial(NamedTuple):
    """Steps of one kind with another number of threads, and how many of them were better so far."""

    kind: Hashable
    threads: int
    n_better: int = 0


@dataclass
class ThreadCount:
    """The number of threads for the next step: `of(kind)`, between 1 and `most`. It learns from `measured`.

    If a step is slow, or the first of its kind lost its cores often, the next step runs with half as many threads. If that
    is faster, the others do too. While there are fewer than `most`, more are tried now and then: half of the way up to a
    number that was too slow, and from time to time all.

    >>> threads = ThreadCount(2)
    >>> threads.measured("decode", 0.7, preemptions=100)  # beside a busy process
    >>> threads.of("decode"), threads.of("train")  # a trial is of one kind
    (1, 2)
    >>> threads.measured("decode", 0.05)
    >>> threads.of("decode"), threads.of("train")
    (1, 1)
    """

    most: int
    limits: TrialLimits = TRIAL_LIMITS
    count: int = 0
    _usual: dict[tuple[Hashable, int], float] = field(default_factory=dict)  # seconds per unit of work
    _latest: dict[tuple[Hashable, int], float] = field(default_factory=dict)
    _now: float = 0.0  # seconds of all measured steps
    _trial: _Trial | None = None
    _too_many: int = 0  # the smallest number that was slower than `count`; above `most` if none is known

    def __post_init__(self) -> None:
        self.count = self.most
        self._too_many = self.most + 1
        self._fewer, self._more = _Wait(self.limits), _Wait(self.limits)

    def of(self, kind: Hashable) -> int:
        """The number of threads for a step of this kind: that of a trial, if there is one of this kind, or `count`."""
        return self._trial.threads if self._trial is not None and self._trial.kind == kind else self.count

    def measured(self, kind: Hashable, seconds: float, work: float = 1.0, *, preemptions: int = 0) -> None:
        """A step has taken `seconds` with `of(kind)` threads. Steps of one `kind` cost the same per unit of `work`.

        `preemptions`: how often the kernel has taken a core from one of its threads.
        """
        self._now += seconds
        cost, at = seconds / work, (kind, self.of(kind))
        usual = self._usual.get(at)
        if self._trial is not None and self._trial.kind == kind:
            self._judge(self._trial, cost, work)
        else:
            self._latest[at] = cost
            is_crowded = preemptions > self.limits.preemptions * seconds
            is_slow = is_crowded if usual is None else cost > self.limits.slow * usual
            if self._trial is None and is_slow and self.count > 1 and self._now >= self._fewer.until:
                self._trial = _Trial(kind, max(1, self.count // 2))
            elif self._trial is None and self.count < self.most and self._now >= self._more.until:
                self._trial = _Trial(kind, self._next_more())
        # Falls at once and rises slowly, so that the first step, which warms up, and slow ones do not count for long.
        self._usual[at] = cost if usual is None else min(cost, usual + 0.1 * (cost - usual))

    def _judge(self, trial: _Trial, cost: float, work: float) -> None:
        """End a trial that failed or was better often enough."""
        before, is_more = self._latest[trial.kind, self.count], trial.threads > self.count
        if cost >= self.limits.better * before:
            (self._more if is_more else self._fewer).fail(self._now, (cost - before) * work)
            self._too_many = trial.threads if is_more else self._too_many
            self._trial = None
        elif trial.n_better + 1 < (self.limits.steps_of_more if is_more else 1):
            self._trial = trial._replace(n_better=trial.n_better + 1)
        else:
            if is_more:
                self._more.until, self._more.seconds = self._now, 0.0
                self._too_many = self.most + 1 if trial.threads == self.most else self._too_many
            else:  # and after two more steps it is tried whether that was only a moment
                self._too_many = self.count
                self._more.until, self._more.seconds = self._now + 2 * cost * work, 0.0
            self._trial, self.count = None, trial.threads
            self._latest[trial.kind, trial.threads] = cost

    def _next_more(self) -> int:
        """Half of the way to what was too many; from where there is nothing between, all."""
        between = (self.count + self._too_many) // 2
        return between if between > self.count else self.most


_counts: dict[int, ThreadCount] = {}  # by the most threads that a caller allows


class _Active(threading.local):
    """What decides now, in this Python thread; None outside of `adjusted_threads`."""

    count: ThreadCount | None = None
    n_measured: int = 0  # steps


_active = _Active()


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
    torch.set_num_threads(count.count)
    try:
        yield
    finally:
        _active.count = None
        torch.set_num_threads(before)


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
        torch.set_num_threads(count.of(kind))
        n_measured, preemptions, start = _active.n_measured, _preemptions(), time.perf_counter()
        yield
        if _active.n_measured == n_measured:
            _active.n_measured += 1
            count.measured(kind, time.perf_counter() - start, work, preemptions=_preemptions() - preemptions)
            torch.set_num_threads(count.count)


def _preemptions() -> int:
    """How often the kernel has taken a core from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def thread_report() -> str:
    """How many threads a step uses now, and why: "2 threads (the machine has 2 cores)"."""
    limit, torch_threads = process_limit(), torch.get_num_threads()
    if limit.is_fixed:
        return _worded(limit.count, limit.reason)
    most = min(torch_threads, limit.count)
    reason = limit.reason if limit.count <= torch_threads else f"torch is set to {torch_threads}"
    count = _counts[most].count if most in _counts else most
    if count < most:
        reason = f"of {most}, because other processes use the cores"
    return _worded(count, reason)


def _worded(count: int, reason: str) -> str:
    return f"{count} thread{'s' if count > 1 else ''} ({reason})"
