"""The results of a benchmark: rows of values, and what was left out and why. It measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gpt2.benchmark.measure import Spread, speed, spread, times_as_fast
from gpt2.benchmark.settings import OURS


class LeftOutError(Exception):
    """An engine cannot take part; the message gives the reason. The benchmark always catches this error."""


@dataclass(frozen=True)
class Entrant:
    """An engine in one setting.

    `agrees` says whether its ids equal those of our float32 model; None if its precision is another one.
    """

    engine: str
    dtype: str = ""
    agrees: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """The value of one engine in one setting. `value` is None if the engine was not timed because its results are wrong."""

    section: str
    setting: str
    number: int | None  # the size that a section varies: tokens of a prompt, rows of a batch, tokens of context
    entrant: Entrant
    unit: str
    value: Spread | None
    times_as_fast: Spread | None = None  # our speed divided by this engine's, in the same dtype
    share_of_limit: float | None = None  # share of the limit by memory bandwidth; in training, of peak arithmetic speed

    def to_dict(self) -> dict[str, Any]:
        """The row as a dict for JSON."""
        ratio = self.times_as_fast
        values: dict[str, Any] = {"section": self.section, "setting": self.setting, "number": self.number}
        values |= {"engine": self.entrant.engine, "dtype": self.entrant.dtype or None, "unit": self.unit}
        values |= _dict_of(self.value, ("median", "low", "high"))
        values |= _dict_of(ratio, ("times_as_fast", "times_as_fast_low", "times_as_fast_high"))
        values |= {"share_of_limit": _rounded(self.share_of_limit), "agrees": self.entrant.agrees, "note": self.entrant.note}
        return values


@dataclass(frozen=True)
class LeftOut:
    """What was not measured, and the reason."""

    section: str
    engine: str
    dtype: str
    reason: str


@dataclass
class Results:
    """All results of a run so far."""

    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)  # name -> version, or "... not installed"
    memory: dict[str, Any] = field(default_factory=dict)  # bandwidth, and the tokens per second that it allows
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def leave_out(self, section: str, engine: str, dtype: str, error: Exception) -> None:
        """Record once why something is left out: the message of a LeftOutError, or type and first line of another error."""
        lines = str(error).strip().splitlines() or [""]
        reason = lines[0] if isinstance(error, LeftOutError) else f"failed with {type(error).__name__}: {lines[0]}"
        item = LeftOut(section, engine, dtype, reason[:300])
        if (engine, dtype, item.reason) not in {(known.engine, known.dtype, known.reason) for known in self.left_out}:
            self.left_out.append(item)

    def to_dict(self) -> dict[str, Any]:
        """All results as a dict for JSON."""
        return {
            "environment": self.environment,
            "settings": self.settings,
            "peers": self.peers,
            "memory": self.memory,
            "rows": [row.to_dict() for row in self.rows],
            "left_out": [asdict(item) for item in self.left_out],
        }


@dataclass(frozen=True)
class Quantity:
    """What a section measures: its names in the results, the unit, and the `amount` that one run processes.

    The value is `amount` per second, or the seconds themselves if `amount` is None.
    """

    section: str
    setting: str
    number: int | None
    unit: str
    amount: float | None = None

    def row(self, entrant: Entrant, value: Spread | None, times_as_fast: Spread | None = None) -> Row:
        """The row of one engine for this quantity."""
        return Row(self.section, self.setting, self.number, entrant, self.unit, value, times_as_fast)


def timed_rows(quantity: Quantity, entrants: Sequence[Entrant], seconds: Sequence[Sequence[float]]) -> list[Row]:
    """One row for each of `entrants`, from its seconds in each round.

    Each peer is compared with our engine of the same dtype, if that was measured. If a round took zero seconds or less,
    which may happen if the value is a small difference of two times, the row has no value.
    """
    amount = quantity.amount
    ours = {entrant.dtype: times for entrant, times in zip(entrants, seconds, strict=True) if entrant.engine == OURS}
    rows = []
    for entrant, times in zip(entrants, seconds, strict=True):
        if min(times) <= 0:
            rows.append(quantity.row(entrant, None))
            continue
        base = ours.get(entrant.dtype)
        is_peer = entrant.engine != OURS and base is not None and min(base) > 0
        ratio = times_as_fast(base, times) if is_peer and base is not None else None
        value = spread(times) if amount is None else speed(times, amount)
        rows.append(quantity.row(entrant, value, ratio))
    return rows


def _dict_of(value: Spread | None, names: tuple[str, str, str]) -> dict[str, float | None]:
    numbers = (None, None, None) if value is None else (value.median, value.low, value.high)
    return {name: _rounded(number) for name, number in zip(names, numbers, strict=True)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
