"""Turns, medians and ratios, with a clock that only the contenders advance."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpt2.benchmark.measure import Contender, Spread, speed, spread, take_turns, times_as_fast
from gpt2.benchmark.results import Entrant, LeftOutError, Quantity, Results, timed_rows
from gpt2.benchmark.settings import OURS


class FakeClock:
    """A clock that advances when a `waiter` is called. `order` records the names of the waiters."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def waiter(self, name: str, seconds: list[float]) -> Callable[..., None]:
        left = iter(seconds)

        def wait(*_: object) -> None:
            self.order.append(name)
            self.now += next(left)

        return wait


def test_turns_rotate_and_warm_ups_and_set_ups_are_not_counted() -> None:
    clock = FakeClock()

    def set_up() -> tuple[str]:
        clock.now += 100
        return ("given",)

    given: list[str] = []
    first, second = clock.waiter("a", [50, 1, 2, 3]), clock.waiter("b", [50, 4, 5, 6])
    contenders = [Contender(first), Contender(lambda text: (given.append(text), second()), set_up)]
    assert take_turns(contenders, 3, clock=clock) == [[1, 2, 3], [4, 5, 6]]
    assert clock.order == list("ab" + "ab" + "ba" + "ab") and given == ["given"] * 4


def test_a_ratio_is_the_median_of_the_ratios_per_round() -> None:
    ours, theirs = [1.0, 10.0, 2.0], [3.0, 10.0, 10.0]  # the machine was slow in the second round
    assert times_as_fast(ours, theirs) == Spread(3.0, 1.0, 5.0)
    assert spread(theirs).median / spread(ours).median == 5.0  # the ratio of the medians is another number
    assert speed([0.5, 2.0, 1.0], 4) == Spread(4.0, 2.0, 8.0)


def test_rows_are_compared_with_ours_of_the_same_dtype() -> None:
    entrants = [Entrant(OURS, "float32"), Entrant("peer", "float32"), Entrant("peer", "int8")]
    seconds = [[1.0, 2.0, 4.0], [2.0, 4.0, 2.0], [1.0, 1.0, 1.0]]
    rows = timed_rows(Quantity("decode", "", None, "tokens/s", 8), entrants, seconds)
    assert [row.value for row in rows] == [Spread(4.0, 2.0, 8.0), Spread(4.0, 2.0, 4.0), Spread(8.0, 8.0, 8.0)]
    assert [row.times_as_fast for row in rows] == [None, Spread(2.0, 0.5, 2.0), None]
    rows = timed_rows(Quantity("load", "", None, "s"), entrants[:2], [[1.0, 3.0], [4.0, 6.0]])
    assert rows[1].value == Spread(5.0, 4.0, 6.0) and rows[1].times_as_fast == Spread(3.0, 2.0, 4.0)
    rows = timed_rows(Quantity("decode", "", None, "tokens/s", 1), entrants[:2], [[0.0, 1.0], [1.0, 1.0]])
    assert rows[0].value is None and rows[1].times_as_fast is None and rows[1].value == Spread(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LeftOutError("has no int8"), "has no int8"),
        (ValueError("a\nb"), "failed with ValueError: a"),
        (KeyError(), "failed"),
    ],
)
def test_each_reason_for_leaving_out_is_one_line_and_recorded_once(error: Exception, reason: str) -> None:
    results = Results()
    for section in ("decode", "batch"):
        results.leave_out(section, "peer", "int8", error)
    [item] = results.left_out
    assert item.reason.startswith(reason) and "\n" not in item.reason and item.section == "decode"
