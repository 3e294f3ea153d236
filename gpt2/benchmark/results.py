"""What a benchmark found: rows of figures, and what was left out and why. It knows nothing of how they were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gpt2.benchmark.measure import Spread, speed, spread, times_as_fast
from gpt2.benchmark.settings import OURS


class LeftOutError(Exception):
    """An engine cannot take part; the message says why. It never leaves the benchmark."""


@dataclass(frozen=True)
class Entrant:
    """An engine in one setting. `agrees`: it gives the ids that our float32 model gives; None where precision differs."""

    engine: str
    dtype: str = ""
    agrees: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One engine's figure in one setting; `value` is None if its results are wrong, for then it is not timed."""

    section: str
    setting: str
    number: int | None  # what a section varies: tokens of a prompt, rows of a batch, tokens of context
    entrant: Entrant
    unit: str
    value: Spread | None
    times_as_fast: Spread | None = None  # ours of the same dtype, against this
    share_of_limit: float | None = None  # of what reading all weights from memory allows; in training, multiplying

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON has it."""
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
    """All that a run found, so far."""

    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)  # name -> version, or that it is not installed
    memory: dict[str, Any] = field(default_factory=dict)  # what its speed allows
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def leave_out(self, section: str, engine: str, dtype: str, error: Exception) -> None:
        """Note why, once: a LeftOutError says it itself, of any other the first line of its message is kept."""
        lines = str(error).strip().splitlines() or [""]
        reason = lines[0] if isinstance(error, LeftOutError) else f"failed with {type(error).__name__}: {lines[0]}"
        item = LeftOut(section, engine, dtype, reason[:300])
        if (engine, dtype, item.reason) not in {(known.engine, known.dtype, known.reason) for known in self.left_out}:
            self.left_out.append(item)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
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
    """What a section times: its names in the results, the unit, and how many of these units one run does.

    An `amount` of None leaves seconds as they are.
    """

    section: str
    setting: str
    number: int | None
    unit: str
    amount: float | None = None

    def row(self, entrant: Entrant, value: Spread | None, times_as_fast: Spread | None = None) -> Row:
        """An engine's figure of this quantity."""
        return Row(self.section, self.setting, self.number, entrant, self.unit, value, times_as_fast)


def timed_rows(quantity: Quantity, entrants: Sequence[Entrant], seconds: Sequence[Sequence[float]]) -> list[Row]:
    """A row for each of `entrants`, from its seconds in each round.

    Each is compared with ours of the same dtype, if that is among them. If a round took zero seconds or less (a difference
    of two times may be lost in noise), the row has no figure.
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
