"""The table's figures, and the picture: what each panel shows, the order of engines, the legend and the limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gpt2.benchmark.measure import Spread
from gpt2.benchmark.report import ENGINE_COLORS, LIMIT_LABEL, MOST_BARS, draw, number, plot, table
from gpt2.benchmark.results import Entrant, Results, Row
from gpt2.benchmark.settings import DTYPES, OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# As on a processor whose ctranslate2 has float32 and int8: 13 engines.
DTYPES_OF = {
    "llama-cpp-python": tuple(reversed(DTYPES)),
    "ctranslate2": ("int8", "float32"),
    "transformers": ("float32", "bfloat16", "float16"),
    OURS: tuple(DTYPES),
}
NAMES = ["gpt2-from-scratch", "transformers", "ctranslate2", "llama-cpp-python"]


def spread(median: float) -> Spread:
    return Spread(median, 0.9 * median, 1.05 * median)


def rows(section: str, setting: str, count: int | None, unit: str, dtypes: Sequence[str] = tuple(DTYPES)) -> list[Row]:
    """One row for each engine and dtype, in an order that no picture should have."""
    return [
        Row(section, setting, count, Entrant(engine, dtype), unit, spread(100 + len(engine) + len(dtype)))
        for engine, known in DTYPES_OF.items()
        for dtype in known
        if dtype in dtypes
    ]


def decode(dtypes: Sequence[str] = tuple(DTYPES)) -> list[Row]:
    limits = [
        Row("decode", "after the first token", None, Entrant("memory", dtype), "tokens/s", spread(400 / DTYPES[dtype]))
        for dtype in dtypes
    ]
    return [
        *rows("decode", "prompt 32, 128 new", None, "tokens/s", dtypes),
        *rows("decode", "after the first token", None, "tokens/s", dtypes),
        *limits,
    ]


def tokenizer() -> list[Row]:
    settings = [f"{what} {text}" for text in ("prose", "code") for what in ("encode new", "encode seen", "decode")]
    engines = ("tokenizers", "tiktoken", OURS)
    return [Row("tokenizer", setting, None, Entrant(e), "MB/s", spread(len(e))) for setting in settings for e in engines]


def scaling(dtypes: Sequence[str], engines: Sequence[str] = (OURS,)) -> list[Row]:
    found = []
    for size, scale in (("124M", 1), ("models/my-own", 3)):
        for entrant in [Entrant(e, dtype) for e in engines for dtype in dtypes if dtype in DTYPES_OF[e]]:
            for context in (64, 1024):
                found.append(Row("scaling", size, context, entrant, "ms/token", spread(scale * (20 + context / 200))))
            for when, factor in (("load", 1), ("use", 2)):
                peak = spread(900 * scale * factor)
                found.append(Row("scaling", f"{size}, peak memory, {when}", None, entrant, "MB", peak))
    return found


def full() -> list[Row]:
    found = [*tokenizer(), *decode()]
    for length in (128, 256, 512):
        found += rows("prefill", "to the first token", length, "tokens/s")
    for size in (1, 8, 16, 32):
        found += rows("batch", "prompts of 16 to 32, 128 new each", size, "tokens/s")
    found += rows("load", "start a process, load, first token", None, "s")
    found += rows("training", "4 rows of 256, dropout 0", None, "tokens/s", ("float32", "bfloat16"))
    return found + scaling(tuple(DTYPES), NAMES)


def drawn(found: list[Row]) -> Figure:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install -r requirements-dev.txt)")
    return draw(Results(settings={"rounds": 5}, rows=found))


def labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def colors(axes: Axes) -> list[str]:
    """Of the bars, from the top."""
    from matplotlib.colors import to_hex
    from matplotlib.patches import Rectangle

    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    return [to_hex(bar.get_facecolor()) for bar in sorted(bars, key=lambda bar: bar.get_y())]


def engine_colors(*engines: str) -> list[str]:
    return [ENGINE_COLORS[engine] for engine in engines]


def test_a_panel_has_a_group_for_each_dtype_and_ours_on_top_of_each() -> None:
    [axes] = drawn(decode(("int8", "float32", "bfloat16"))).axes
    assert axes.get_title("left") == "decode, after the first token"
    assert labels(axes) == ["float32", "bfloat16", "int8"]
    ours, transformers, ctranslate2, llama = NAMES
    assert colors(axes) == engine_colors(ours, transformers, ctranslate2, llama, ours, transformers, llama) + engine_colors(
        ours, ctranslate2, llama
    )
    assert axes.yaxis_inverted()  # the first bar is the highest


def test_each_bar_has_its_number() -> None:
    [axes] = drawn([Row("training", "", None, Entrant(OURS, "float32"), "tokens/s", spread(2345.6))]).axes
    assert "2,346" in [text.get_text() for text in axes.texts]


def test_the_limit_is_a_line_across_each_group() -> None:
    from matplotlib.collections import LineCollection

    [axes] = drawn(decode(("float32", "int8"))).axes
    lines = [part.get_segments() for part in axes.collections if isinstance(part, LineCollection)]
    long = [segments[0] for segments in lines if len(segments) == 1 and segments[0][0][0] == segments[0][1][0]]
    assert [line[0][0] for line in long] == [100, 400]  # 400 bytes per token over 4 and 1 bytes per weight
    assert [line[1][1] - line[0][1] for line in long] == [4, 3]  # bars


def test_a_number_that_would_cross_the_limit_stands_beyond_it() -> None:
    found = [Row("decode", "", None, Entrant(OURS, "int8"), "tokens/s", spread(median)) for median in (90, 50)]
    found.append(Row("decode", "", None, Entrant("memory", "int8"), "tokens/s", spread(100)))
    [axes] = drawn([replace(row, setting="after the first token") for row in found]).axes
    assert [text.xy[0] for text in axes.texts if text.get_text() in ("90.0", "50.0")] == [100, 1.05 * 50]


def test_one_legend_for_the_figure_names_ours_first_and_the_limit_last() -> None:
    figure = drawn([*tokenizer(), *decode(), *rows("batch", "", 8, "tokens/s")])
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*NAMES, "tiktoken", "tokenizers", LIMIT_LABEL]
    assert all(axes.get_legend() is None for axes in figure.axes)
    [legend] = drawn(rows("batch", "", 8, "tokens/s")).legends
    assert [text.get_text() for text in legend.get_texts()] == NAMES


def test_a_full_run_has_at_most_a_dozen_bars_in_a_panel_and_draws_every_engine() -> None:
    figure = drawn(full())
    assert MOST_BARS == 12
    counts = [(axes.get_title("left"), len(axes.patches)) for axes in figure.axes]
    # 13 engines are in two panels; of lengths and batch sizes, the smallest and the largest.
    assert counts == [
        ("tokenizer", 9), ("tokenizer", 9),
        ("decode, after the first token", 7), ("decode, after the first token", 6),
        ("prefill of 128 tokens", 7), ("prefill of 128 tokens", 6),
        ("prefill of 512 tokens", 7), ("prefill of 512 tokens", 6),
        ("batch of 8 rows", 7), ("batch of 8 rows", 6), ("batch of 32 rows", 7), ("batch of 32 rows", 6),
        ("start to the first token", 7), ("start to the first token", 6),
        ("training", 7),
        ("scaling: float32", 0), ("scaling: bfloat16", 0), ("scaling: float16", 0), ("scaling: int8", 0),
        ("peak memory", 7), ("peak memory", 6),
    ]  # fmt: skip


def test_two_panels_of_one_title_stand_side_by_side_on_one_scale() -> None:
    found = drawn([*rows("training", "", None, "tokens/s"), *decode(("float32",)), *rows("batch", "", 8, "tokens/s")]).axes
    places = [place for axes in found if (place := axes.get_subplotspec())]
    titles = [axes.get_title("left") for axes in found]
    assert titles == ["decode, after the first token", *["batch of 8 rows"] * 2, *["training"] * 2]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    first, second = drawn(decode()).axes
    assert first.get_xlim() == second.get_xlim() and first.get_xlim()[1] > 400


def test_scaling_has_a_panel_for_each_dtype_and_one_of_the_peaks_in_use() -> None:
    *lines, memory = drawn(scaling(("float32", "int8"))).axes
    assert [axes.get_title("left") for axes in lines] == ["scaling: float32", "scaling: int8"]
    for axes in lines:
        assert [list(line.get_xdata()) for line in axes.lines] == [[64, 1024]] * 2
        assert {"124M", "my-own"} <= {text.get_text() for text in axes.texts}
    assert labels(memory) == ["124M float32", "124M int8", "my-own float32", "my-own int8"]
    assert [round(bar.get_width()) for bar in memory.patches] == [1800, 1800, 5400, 5400]


def test_no_two_texts_overlap_at_900_pixels() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figure = drawn(full())
    FigureCanvasAgg(figure).draw()
    assert figure.bbox.width == 900
    texts = [*figure.legends[0].get_texts()]
    for axes in figure.axes:
        texts += [child for child in axes.get_children() if isinstance(child, Text)]
        texts += [*axes.get_yticklabels(), *axes.get_xticklabels()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    assert len(boxes) > 150
    for place, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= 900 and box.height >= 8, text
        for other, other_box in boxes[:place]:
            assert not box.overlaps(other_box), (text, other)


def test_engines_without_a_figure_are_not_drawn() -> None:
    wrong = Row("batch", "", 8, Entrant("transformers", "float32", False), "tokens/s", None)
    figure = drawn([*rows("batch", "", 8, "tokens/s", ("int8",)), wrong])
    assert [labels(axes) for axes in figure.axes] == [["int8"]]
    # What comes after the first token may be lost in noise: then the whole time is drawn.
    lost = [row for row in decode(("float32",)) if row.setting != "after the first token" or row.entrant.engine == "memory"]
    assert [axes.get_title("left") for axes in drawn(lost).axes] == ["decode, prompt 32, 128 new"]
    assert drawn([]).axes == []


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_picture_is_written_in_each_format(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install -r requirements-dev.txt)")
    plot(Results(settings={"rounds": 5}, rows=decode()), tmp_path / f"speed.{kind}")
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert (tmp_path / f"speed.{kind}").read_bytes().startswith(starts[kind])


def test_the_table_has_a_line_for_each_row_and_says_what_is_wrong() -> None:
    environment = {
        "device": "cpu",
        "cpu": "Xeon",
        "cores": 2,
        "threads": 1,
        "date": "2026-01-01",
        "versions": {"torch": "2"},
    }
    ratio = Spread(1.25, 1.1, 1.5)
    found = [
        Row("decode", "prompt 32", None, Entrant(OURS, "int8"), "tokens/s", Spread(171.25, 170, 180), None, 0.713),
        Row("decode", "prompt 32", None, Entrant("ctranslate2", "int8"), "tokens/s", Spread(70, 65, 72), ratio),
        Row("decode", "prompt 32", None, Entrant("transformers", "float32", False, "its ids differ"), "tokens/s", None),
    ]
    lines = table(Results(environment, {"rounds": 3, "texts": "prose"}, rows=found))
    start = lines.index("decode")
    cells = [line.split("  ") for line in lines[start + 2 : start + 5]]
    kept = [[cell.strip() for cell in line if cell.strip()] for line in cells]
    assert kept == [
        ["prompt 32", OURS, "int8", "171", "(170 to 180)", "tokens/s", "71%"],
        ["prompt 32", "ctranslate2", "int8", "70.0", "(65.0 to 72.0)", "tokens/s", "1.25 (1.10 to 1.50)"],
        ["prompt 32", "transformers", "float32", "-", "tokens/s", "NO", "its ids differ"],
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(0.00123, "0.00123"), (0.0, "0.0"), (9.876, "9.88"), (171.25, "171"), (12345.6, "12,346")]
)
def test_numbers_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert number(value) == text
