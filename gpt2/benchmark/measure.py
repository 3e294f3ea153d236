"""Time contenders in turns, so that other work on the machine affects all of them equally. It knows no engines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Contender:
    """Something to time: `run`, with the arguments that `set_up` returns. `set_up` is called before each run, untimed."""

    run: Callable[..., object]
    set_up: Callable[[], tuple[Any, ...]] = tuple


@dataclass(frozen=True)
class Spread:
    """The median of several measurements, and the smallest and largest of them."""

    median: float
    low: float
    high: float


def take_turns(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    warm_ups: int = 1,
    pause: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """The seconds of each contender in each round, one list per contender. `warm_ups` rounds are run first, uncounted.

    Each round starts with another contender, so that none always runs after the same one. There is a pause of `pause`
    seconds before each run, because the threads of some engines keep spinning for a while after their work.
    """
    times: list[list[float]] = [[] for _ in contenders]
    for number in range(-warm_ups, rounds):
        for turn in range(len(contenders)):
            place = (turn + max(number, 0)) % len(contenders)
            arguments = contenders[place].set_up()
            time.sleep(pause)
            began = clock()
            contenders[place].run(*arguments)
            seconds = clock() - began
            if number >= 0:
                times[place].append(seconds)
    return times


def spread(values: Sequence[float]) -> Spread:
    """The median, minimum and maximum of `values` (at least one)."""
    return Spread(statistics.median(values), min(values), max(values))


def speed(seconds: Sequence[float], amount: float) -> Spread:
    """`amount` per second, where each of `seconds` is the time for one `amount`."""
    return spread([amount / value for value in seconds])


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times as fast our side is: their seconds divided by ours, for each round.

    Ratios are computed per round, because both sides of a round ran under the same conditions.
    """
    return spread([their_seconds / our_seconds for our_seconds, their_seconds in zip(ours, theirs, strict=True)])
