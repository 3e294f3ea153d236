"""What a benchmark found, as a table, and as a picture. It knows rows, not how they came about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.benchmark.measure import Spread
from gpt2.benchmark.results import Entrant, Results, Row
from gpt2.benchmark.settings import OURS, SECTIONS
from gpt_config.atomic_write import atomic_write
from gpt_config.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What `number` is.
_NUMBERS = {"prefill": "prompt", "batch": "rows", "scaling": "context"}
_COLORS = {OURS: "tab:blue", "memory": "tab:gray", "transformers": "tab:orange", "ctranslate2": "tab:green"}
_OTHER_COLOR = "tab:purple"
# Of lines, sizes have colours, engines have marks, and dtypes have strokes.
_MARKERS, _STYLES = (".", "x", "+", "^", "s"), ("-", "--", ":", "-.")
PLOT_FORMATS = ("png", "svg", "pdf")


def table(results: Results) -> list[str]:
    """The lines of the table: for each section its rows, then what was left out, then what the columns mean."""
    there = results.environment
    device = "" if there["device"] == "cpu" else f"{there['device']}, "
    lines = [
        f"{device}{there['cpu']}, {there['cores']} cores, {there['threads']} threads, {there['date']}",
        ", ".join(f"{name} {version}" for name, version in there["versions"].items()),
        f"texts: {results.settings['texts']}",
    ]
    for section in SECTIONS:
        rows = [row for row in results.rows if row.section == section]
        if rows:
            lines += ["", section, *_aligned([_head(section), *map(_cells, rows)])]
    if results.left_out:
        lines += ["", "not measured"]
        lines += _aligned([(item.section, item.engine, item.dtype, item.reason) for item in results.left_out])
    return [
        *lines,
        "",
        f"median (least to greatest) of {results.settings['rounds']} rounds, in which all took turns;",
        f"ours against: how many times as fast {OURS} of the same dtype was, the median of the rounds' ratios;",
        "of limit: the share of what reading all weights once a token allows; a greedy token needs not quite all of them;",
        "in training, the share of what the operations of a large matrix product allow;",
        "same: its results are those of our float32 model, which was checked first",
    ]


def _head(section: str) -> tuple[str, ...]:
    return (
        "setting",
        _NUMBERS.get(section, ""),
        "engine",
        "dtype",
        "median",
        "",
        "unit",
        "ours against",
        "of limit",
        "same",
        "",
    )


def _cells(row: Row) -> tuple[str, ...]:
    ratio, entrant = row.times_as_fast, row.entrant
    return (
        row.setting,
        "" if row.number is None else str(row.number),
        entrant.engine,
        entrant.dtype,
        "-" if row.value is None else number(row.value.median),
        "" if row.value is None else f"({number(row.value.low)} to {number(row.value.high)})",
        row.unit,
        "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        "" if row.share_of_limit is None else f"{row.share_of_limit:.0%}",
        {True: "yes", False: "NO", None: ""}[entrant.agrees],
        entrant.note,
    )


def number(value: float) -> str:
    """Three digits or more, and no powers of ten."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    used = [place for place, width in enumerate(widths) if width]
    return ["  " + "  ".join(row[place].ljust(widths[place]) for place in used).rstrip() for row in rows]


def check_plot(path: Path) -> None:
    """Before an hour is spent on it: InputError unless it can be drawn, with what to do."""
    if path.suffix.removeprefix(".").lower() not in PLOT_FORMATS:
        raise InputError(f"plot={str(path)!r} must end with one of .{', .'.join(PLOT_FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("a plot needs matplotlib: pip install '.[benchmark]'") from None


def plot(results: Results, path: Path) -> None:
    """Draw every section into one picture. WriteError if it cannot be written."""
    from matplotlib.figure import Figure

    panels = _panels([row for row in results.rows if row.value is not None])
    n_columns = min(2, max(1, len(panels)))
    n_rows = max(1, math.ceil(len(panels) / n_columns))
    bars = max((len(rows) for _, rows in panels), default=1)
    figure = Figure(figsize=(7.5 * n_columns, max(3.0, 0.28 * bars + 1) * n_rows), layout="constrained")
    all_axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, (title, rows) in zip(all_axes, panels, strict=False):
        draw = _draw_lines if rows[0].unit == "ms/token" else _draw_bars
        draw(axes, rows)
        axes.set_title(title)
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    kind = path.suffix.removeprefix(".").lower()
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=120, format=kind))


def _panels(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """(title, rows) of each picture: what is measured in one unit in one section."""
    keys = dict.fromkeys((row.section, row.unit) for row in rows)
    return [
        (
            section if unit != "MB" else f"{section}: memory",
            [row for row in rows if (row.section, row.unit) == (section, unit)],
        )
        for section, unit in keys
    ]


def _draw_bars(axes: Axes, rows: list[Row]) -> None:
    labels = [f"{row.setting}{'' if row.number is None else f' {row.number}'}: {_name(row.entrant)}" for row in rows]
    values = [row.value or Spread(0, 0, 0) for row in rows]
    errors = [[v.median - v.low for v in values], [v.high - v.median for v in values]]
    colors = [_COLORS.get(row.entrant.engine, _OTHER_COLOR) for row in rows]
    axes.barh(range(len(rows)), [v.median for v in values], xerr=errors, color=colors, error_kw={"linewidth": 0.8})
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(rows[0].unit)
    axes.grid(axis="x", alpha=0.3)


def _draw_lines(axes: Axes, rows: list[Row]) -> None:
    lines: dict[tuple[str, Entrant], list[tuple[int | None, float]]] = {}
    for row in rows:
        if row.value is not None:
            lines.setdefault((row.setting, row.entrant), []).append((row.number, row.value.median))
    sizes = list(dict.fromkeys(size for size, _ in lines))
    engines = list(dict.fromkeys(entrant.engine for _, entrant in lines))
    dtypes = list(dict.fromkeys(entrant.dtype for _, entrant in lines))
    for (size, entrant), points in lines.items():
        looks: dict[str, Any] = {
            "color": f"C{sizes.index(size) % 10}",
            "marker": _MARKERS[engines.index(entrant.engine) % len(_MARKERS)],
            "linestyle": _STYLES[dtypes.index(entrant.dtype) % len(_STYLES)],
        }
        axes.plot(*zip(*points, strict=True), label=f"{size}: {_name(entrant)}", **looks)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel(rows[0].unit)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _name(entrant: Entrant) -> str:
    return f"{entrant.engine} {entrant.dtype}".strip()
