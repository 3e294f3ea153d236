"""How contenders are timed: in turns, so that whatever else the machine does meets all of them. It knows no engines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Contender:
    """What is timed: `run`, with the arguments that `set_up` makes for it just before, which is not timed."""

    run: Callable[..., object]
    set_up: Callable[[], tuple[Any, ...]] = tuple


@dataclass(frozen=True)
class Spread:
    """The median of several measurements, the least and the greatest."""

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
    """Seconds of each contender in each round; `warm_ups` rounds before them are not counted.

    Each round begins with another contender, so that none always runs after the same one. `pause` seconds lie before each
    run: the threads of some engines go on spinning for a while after their work.
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
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def speed(seconds: Sequence[float], amount: float) -> Spread:
    """How much of `amount` was done a second."""
    return spread([amount / value for value in seconds])


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times as fast ours is, from the seconds of both: the ratios of each round, for a round's two sides met the
    same machine."""
    return spread([their_seconds / our_seconds for our_seconds, their_seconds in zip(ours, theirs, strict=True)])
