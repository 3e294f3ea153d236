"""The results of a benchmark as a table and as a plot. It knows rows, not how they were measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.benchmark.results import Results, Row
from gpt2.benchmark.settings import DTYPES, OURS, PEERS, SECTIONS
from gpt_config.atomic_write import atomic_write
from gpt_config.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The heading of the column with a row's `number`, by section.
_NUMBERS = {"prefill": "prompt", "batch": "rows", "scaling": "context"}
PLOT_FORMATS = ("png", "svg", "pdf")

MOST_BARS = 12  # per panel
# Engines are drawn in this order. Ours is the darkest; colour-blind readers can tell the others apart too.
ENGINE_COLORS = dict(zip((OURS, *PEERS), ("#0058a3", "#e69f00", "#8edcba", "#c274ad", "#9fd3f5", "#949494"), strict=True))
_OTHER_COLOR = "#d0d0d0"
_MEMORY = "memory"  # listed like an engine: the speed at which all weights can be read
LIMIT_LABEL = "limit: read all weights for each token"
# Sections with rows for two settings: the end of the setting to draw. In decode it is the one with a limit, in scaling the
# higher of the two peaks of memory.
_MOST_TELLING = {"decode": "after the first token", "scaling": "use"}
_WIDTH = 9.0  # inches: 900 pixels at 100 per inch
_BAR, _GAP, _LINES_HEIGHT = 0.165, 0.6, 14  # inches; then in bars: between groups, a panel of lines
_TITLES = 0.68  # inches above and below the bars of a panel
_FONT = 8.0


def table(results: Results) -> list[str]:
    """The lines of the table: the rows of each section, what was left out, and the meaning of the columns."""
    there = results.environment
    device = "" if there["device"] == "cpu" else f"{there['device']}, "
    lines = [
        f"{device}{there['cpu']}, {_number(there['cores'], 'core')}, {_number(there['threads'], 'thread')}"
        f"{_beside(results)}, {there['date']}",
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
        f"median (lowest to highest) of {results.settings['rounds']} rounds; the engines take turns in each round;",
        f"ours against: how many times as fast {OURS} of the same dtype is, the median of the rounds' ratios;",
        "of limit: share of the speed at which all weights can be read once per token; a greedy token reads fewer of them;",
        "in training, share of the operations per second of a large matrix product;",
        "same: the results equal those of our float32 model, which is checked before anything is timed",
    ]


def _beside(results: Results) -> str:
    count = results.settings.get("beside", 0)
    return f" beside {count} busy process{'es' if count > 1 else ''}" if count else ""


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"


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
    """At least three digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    used = [place for place, width in enumerate(widths) if width]
    return ["  " + "  ".join(row[place].ljust(widths[place]) for place in used).rstrip() for row in rows]


def check_plot(path: Path) -> None:
    """Raise InputError if `plot` could not write `path`. Called before the benchmark, which may take an hour."""
    if path.suffix.removeprefix(".").lower() not in PLOT_FORMATS:
        raise InputError(f"plot={str(path)!r} must end with one of .{', .'.join(PLOT_FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("a plot needs matplotlib: pip install '.[benchmark]'") from None


def plot(results: Results, path: Path) -> None:
    """Save what `draw` draws. WriteError if it cannot be written."""
    figure = draw(results)
    kind = path.suffix.removeprefix(".").lower()
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=200, format=kind, facecolor="white"))


@dataclass
class _Panel:
    """Groups of bars, one group per label; or, if `has_lines`, one group with the rows of all lines."""

    section: str
    title: str
    unit: str
    groups: dict[str, list[Row]] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)  # label -> the speed that memory allows
    has_lines: bool = False

    @property
    def bars(self) -> list[Row]:
        return [row for rows in self.groups.values() for row in rows]

    @property
    def height(self) -> float:
        """The height in bars."""
        return _LINES_HEIGHT if self.has_lines else len(self.bars) + _GAP * len(self.groups)

    @property
    def greatest(self) -> float:
        return max([row.value.high for row in self.bars if row.value] + list(self.limits.values()), default=1.0)


def draw(results: Results) -> Figure:
    """Draw all sections: a panel for each section and length, with at most `MOST_BARS` bars.

    Bars are grouped by dtype and coloured by engine, ours first. A black line is the speed that memory allows. Of
    several lengths or batch sizes, the smallest and the largest are drawn; `table` has all.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = _panels(results.rows)
    lines = _arranged(panels)
    n_columns = max((len(line) for line in lines), default=1)
    heights = [max(panel.height for panel in line) for line in lines]
    inches = sum(height * _BAR + _TITLES for height in heights) + 0.8
    width = _WIDTH if n_columns > 1 else 0.7 * _WIDTH
    figure = Figure(figsize=(width, inches), dpi=100, layout=ConstrainedLayoutEngine(hspace=0.05, wspace=0.05))
    if lines:
        grid = figure.add_gridspec(len(lines), n_columns, height_ratios=heights)
    for place, line in enumerate(lines):
        for column, panel in enumerate(line):
            axes = figure.add_subplot(grid[place, column])
            if panel.has_lines:
                _draw_lines(axes, panel)
            else:
                # Panels with the same title have the same scale.
                same = [other for other in panels if other.title == panel.title]
                _draw_bars(axes, panel, heights[place], max(other.greatest for other in same))
    _add_legend(figure, panels, n_columns)
    caption = f"Medians of {results.settings['rounds']} rounds; thin lines go from the lowest to the highest."
    figure.supxlabel(caption, fontsize=_FONT, color="#444444")
    return figure


def _arranged(panels: list[_Panel]) -> list[list[_Panel]]:
    """The lines of the figure, with two panels each. Two panels with the same title are put on one line."""
    lines: list[list[_Panel]] = []
    for place, panel in enumerate(panels):
        starts = place + 1 < len(panels) and panels[place + 1].title == panel.title
        starts = starts and (place == 0 or panels[place - 1].title != panel.title)
        if starts or not lines or len(lines[-1]) == 2:
            lines.append([panel])
        else:
            lines[-1].append(panel)
    return lines


def _panels(all_rows: Iterable[Row]) -> list[_Panel]:
    rows = [row for row in all_rows if row.value is not None]
    panels = []
    for section in SECTIONS:
        there = [row for row in rows if row.section == section]
        if section == "scaling":
            panels += _line_panels([row for row in there if row.unit != "MB"])
            there = [row for row in there if row.unit == "MB"]
            there = there if len(there) <= 2 * MOST_BARS else _of_the_largest(there)
        there = _most_telling(section, there)
        for count in _first_and_last(row.number for row in there):
            panels += _bar_panels(section, [row for row in there if row.number == count])
    return panels


def _most_telling(section: str, rows: list[Row]) -> list[Row]:
    """The rows whose setting ends as in `_MOST_TELLING`; if no engine has such a row, the other rows of engines."""
    ending = _MOST_TELLING.get(section, "")
    chosen = [row for row in rows if row.setting.endswith(ending)]
    has_engines = any(row.entrant.engine != _MEMORY for row in chosen)
    return chosen if has_engines else [row for row in rows if row.entrant.engine != _MEMORY and row not in chosen]


def _of_the_largest(rows: list[Row]) -> list[Row]:
    """The rows of the largest model, which is the last one."""
    size = rows[-1].setting.split(",")[0]
    return [row for row in rows if row.setting.split(",")[0] == size]


def _first_and_last(numbers: Iterable[int | None]) -> list[int | None]:
    """The smallest and the largest number; 1 only if there is no other, because a batch of one row is plain decoding."""
    known = sorted({value for value in numbers if value is not None})
    if not known:
        return [None]
    several = [value for value in known if value > 1] or known
    return list(dict.fromkeys((several[0], several[-1])))


def _bar_panels(section: str, rows: list[Row]) -> list[_Panel]:
    """Panels with about the same number of bars, which are grouped by label."""
    groups: dict[str, list[Row]] = {}
    limits: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: _place(row.entrant.dtype, DTYPES)):
        label = _label(row)
        if row.entrant.engine == _MEMORY and row.value is not None:
            limits[label] = row.value.median
        else:
            groups.setdefault(label, []).append(row)
    if section == "scaling":  # by size, then by dtype
        groups = {label: groups[label] for label in dict.fromkeys(map(_label, rows))}
    for bars in groups.values():
        bars.sort(key=lambda row: _place(row.entrant.engine, ENGINE_COLORS))
    n_bars = sum(map(len, groups.values()))
    most = n_bars / max(1, math.ceil(n_bars / MOST_BARS))
    panels: list[_Panel] = []
    for label, bars in groups.items():
        if not panels or len(panels[-1].bars) >= most or len(panels[-1].bars) + len(bars) > MOST_BARS:
            panels.append(_Panel(section, _title(rows[0]), rows[0].unit))
        panels[-1].groups[label] = bars
        panels[-1].limits |= {label: limits[label]} if label in limits else {}
    return panels


def _line_panels(rows: list[Row]) -> list[_Panel]:
    dtypes = sorted({row.entrant.dtype for row in rows}, key=lambda dtype: _place(dtype, DTYPES))
    return [
        _Panel(
            "scaling", f"scaling: {dtype}", "ms/token", {"": [row for row in rows if row.entrant.dtype == dtype]}, {}, True
        )
        for dtype in dtypes
    ]


def _place(name: str, known: Iterable[str]) -> int:
    names = list(known)
    return names.index(name) if name in names else len(names)


def _label(row: Row) -> str:
    """The label of the row's group of bars."""
    if row.section == "scaling":
        return f"{_short(row.setting.split(',')[0])} {row.entrant.dtype}"
    return row.entrant.dtype or row.setting


def _short(size: str) -> str:
    """The name of a preset, or at most 12 characters of a folder's name."""
    return size.rstrip("/").split("/")[-1][:12]


def _title(row: Row) -> str:
    count = {"prefill": f" of {row.number} tokens", "batch": f" of {row.number} rows"}.get(row.section, "")
    what = {"scaling": "peak memory", "load": "start to the first token", "decode": f"decode, {row.setting}"}
    return what.get(row.section, f"{row.section}{count}")


def _draw_bars(axes: Axes, panel: _Panel, height: float, greatest: float) -> None:
    """Draw a panel of bars. `height`, in bars, is that of the tallest panel in its line, so that all bars have one width."""
    from matplotlib.patheffects import withStroke

    width = 1.2 * greatest  # leaves space for the number after the longest bar
    axes.set_xlim(0, width)
    top, middles = 0.0, []
    for label, rows in panel.groups.items():
        places = [top + 0.5 + place for place in range(len(rows))]
        values = [row.value for row in rows if row.value is not None]
        medians = [value.median for value in values]
        errors = [[v.median - v.low for v in values], [v.high - v.median for v in values]]
        colors = [ENGINE_COLORS.get(row.entrant.engine, _OTHER_COLOR) for row in rows]
        axes.barh(places, medians, 0.86, xerr=errors, color=colors, error_kw={"linewidth": 0.8, "ecolor": "#222222"})
        limit = panel.limits.get(label)
        if limit is not None:
            line = axes.vlines(limit, top, top + len(rows), colors="black", linewidth=1.5, zorder=3)
            line.set_path_effects([withStroke(linewidth=3.5, foreground="white")])  # visible on a dark bar
        for place, row, value in zip(places, rows, values, strict=True):
            hits_limit = limit is not None and value.high <= limit < value.high + 0.15 * width
            axes.annotate(
                number(value.median), (limit if hits_limit else value.high, place), (4, 0), textcoords="offset points",
                va="center_baseline", fontsize=_FONT - 0.5, fontweight="bold" if row.entrant.engine == OURS else "normal",
            )  # fmt: skip
        middles.append(top + len(rows) / 2)
        top += len(rows) + _GAP
    axes.set_yticks(middles, list(panel.groups), fontsize=_FONT)
    axes.set_ylim(height - _GAP / 2, -_GAP / 2)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines.left.set_bounds(top - _GAP, 0)
    better = "less is better" if panel.unit in ("s", "MB") else "more is better"
    _set_title(axes, panel.title, f"{panel.unit}, {better}")


def _draw_lines(axes: Axes, panel: _Panel) -> None:
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in panel.bars:
        if row.value is not None and row.number is not None:
            lines.setdefault((row.setting, row.entrant.engine), []).append((row.number, row.value.median))
    named: set[str] = set()
    for (size, engine), points in sorted(lines.items(), key=lambda line: _place(line[0][1], ENGINE_COLORS)):
        looks: dict[str, Any] = {"linewidth": 2.0, "zorder": 3} if engine == OURS else {"linewidth": 1.2}
        color = ENGINE_COLORS.get(engine, _OTHER_COLOR)
        axes.plot(*zip(*sorted(points), strict=True), color=color, marker="o", markersize=3, **looks)
        if size not in named:  # the size is written at our line, which comes first
            named.add(size)
            axes.annotate(_short(size), max(points), (5, 0), textcoords="offset points", va="center", fontsize=_FONT)
    contexts = sorted({context for points in lines.values() for context, _ in points})
    times = [milliseconds for points in lines.values() for _, milliseconds in points]
    low, high = min(times) / 1.6, max(times) * 1.6
    ticks = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(contexts[0] / 1.2, contexts[-1] * 2)  # leaves space for the sizes
    axes.set_ylim(low, high)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts], fontsize=_FONT)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=_FONT)
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _set_title(axes, panel.title, f"{panel.unit} by tokens of context, less is better")


def _set_title(axes: Axes, title: str, below: str) -> None:
    axes.annotate(
        below, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=_FONT - 0.5, color="#444444"
    )
    axes.set_title(title, loc="left", fontsize=_FONT + 1.5, fontweight="bold", pad=15)


def _add_legend(figure: Figure, panels: list[_Panel], n_columns: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    engines = {row.entrant.engine for panel in panels for row in panel.bars}
    handles: list[Patch | Line2D] = [
        Patch(color=ENGINE_COLORS.get(engine, _OTHER_COLOR), label=engine)
        for engine in sorted(engines, key=lambda engine: _place(engine, ENGINE_COLORS))
    ]
    if any(panel.limits for panel in panels):
        handles.append(Line2D([], [], color="black", linewidth=1.5, label=LIMIT_LABEL))
    if handles:
        ncols = 3 if n_columns == 1 else len(handles) if len(handles) <= 5 else 4
        figure.legend(
            handles=handles, loc="outside upper left", ncols=ncols,
            frameon=False, fontsize=_FONT, columnspacing=1.5, handlelength=1.8,
        )  # fmt: skip
