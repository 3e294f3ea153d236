"""Matplotlib pictures of an Overview, for papers, in the light colours of the page. It computes nothing.

matplotlib is imported in the functions that draw. T: tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.inspection.colours import LIGHT, share_level, surprisal_level
from gpt2.inspection.overviews import Overview, signed
from gpt_config.atomic_write import atomic_write
from gpt_config.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TOKENS = 128
_DPI = 200
_ROW = 0.2  # inches per bar or token
_PLAIN: dict[str, Any] = {"parse_math": False, "fontfamily": "monospace", "fontsize": 7}  # of tokens, which may contain "$"


def check_matplotlib() -> None:
    """Raise InputError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("pictures need matplotlib: pip install '.[train]'") from None


def save_pictures(shown: Overview, folder: str | Path) -> list[Path]:
    """Draw all pictures of an overview of at most 128 tokens into PNG files of a folder, and return their paths.

    They are surprisal, next, parts, heads, head, lens, and, if they were computed, attribution and patching. Each is drawn
    before the first is written. InputError without matplotlib, WriteError if the folder cannot be written.
    """
    check_matplotlib()
    if len(shown.ids) > MAX_TOKENS:
        raise InputError(f"the text has {len(shown.ids)} tokens, and a picture shows at most {MAX_TOKENS}: shorten the text")
    best = next(iter(shown.notable_heads(1).values()))[0]
    figures = {
        "surprisal": draw_surprisal(shown),
        "next": draw_next(shown),
        "parts": draw_parts(shown),
        "heads": draw_heads(shown),
        "head": draw_head(shown, best.layer, best.head),
        "lens": draw_lens(shown),
    }
    if shown.attribution is not None:
        figures["attribution"] = draw_attribution(shown)
    if shown.patching is not None:
        figures["patching"] = draw_patching(shown)
    paths = []
    for name, figure in figures.items():
        paths.append(Path(folder) / f"{name}.png")
        atomic_write(paths[-1], _saving(figure))
    return paths


def _saving(figure: Figure) -> Callable[[Path], None]:
    return lambda temporary: figure.savefig(temporary, dpi=_DPI, format="png", facecolor="white")


def draw_surprisal(shown: Overview) -> Figure:
    """Draw the surprisal of each token in bits, as bars below the tokens."""
    figure, ax = _figure(max(3.0, _ROW * len(shown.ids) + 0.8), 2.4)
    bits = [0.0 if one is None else one for one in shown.bits]
    ax.bar(range(len(bits)), bits, color=[LIGHT["surprisal"][surprisal_level(one)] for one in bits], edgecolor=LIGHT["line"])
    _tokens_below(ax, shown.labels)
    ax.set(ylabel="surprisal (bits)", xlim=(-0.6, len(bits) - 0.4))
    return figure


def draw_next(shown: Overview, place: int = -1) -> Figure:
    """Draw the most probable tokens after the token at `place`."""
    guesses = shown.guesses[place]
    figure = _bars([one.label for one in guesses], [one.probability for one in guesses], "probability")
    figure.axes[0].set_title(f"after {shown.labels[place]!r}", **_PLAIN)
    return figure


def draw_parts(shown: Overview, place: int = -1, n: int = 12) -> Figure:
    """Draw the `n` largest parts of the logit of the most probable token after the token at `place`."""
    values = shown.parts[:, place]
    largest = values.abs().topk(min(n, len(values))).indices.tolist()
    figure = _bars([shown.part_names[i] for i in largest], values[largest].tolist(), "part of the logit")
    figure.axes[0].set_title(f"logit of {shown.guesses[place][0].label!r}", **_PLAIN)
    return figure


def draw_heads(shown: Overview) -> Figure:
    """Draw the patterns of all heads: rows are layers, columns are heads."""
    from matplotlib.figure import Figure

    size = 0.75
    figure = Figure(figsize=(size * shown.n_head + 0.3, size * shown.n_layer + 0.3), layout="constrained")
    axes = figure.subplots(shown.n_layer, shown.n_head, squeeze=False)
    for layer, row in enumerate(axes):
        for head, ax in enumerate(row):
            ax.imshow(shown.patterns[layer, head].numpy(), cmap=_colours(), vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{layer}.{head}", fontsize=6, pad=2)
    return figure


def draw_head(shown: Overview, layer: int, head: int) -> Figure:
    """Draw the pattern of one head: a row is the token that looks, a column the token that is looked at."""
    if not (0 <= layer < shown.n_layer and 0 <= head < shown.n_head):
        raise InputError(f"there is no head {layer}.{head}: the model has {shown.n_layer} layers of {shown.n_head} heads")
    side = max(2.5, _ROW * len(shown.ids) + 1)
    figure, ax = _figure(side + 0.6, side)
    image = ax.imshow(shown.patterns[layer, head].numpy(), cmap=_colours(), vmin=0, vmax=1)
    _tokens_below(ax, shown.labels)
    ax.set_yticks(range(len(shown.labels)), shown.labels, **_PLAIN)
    ax.set_title(f"layer {layer}, head {head}", fontsize=9)
    figure.colorbar(image, ax=ax, shrink=0.6)
    return figure


def draw_lens(shown: Overview) -> Figure:
    """Draw the best token of the logit lens after each layer, at each token. Colour is its probability."""
    posts = [line for name, line in zip(shown.lens_names, shown.lens, strict=True) if name.endswith("hook_resid_post")]
    levels = [[share_level(best.probability) for best, *_ in line] for line in posts]
    texts = [[best.label for best, *_ in line] for line in posts]
    return _grid(shown.labels, levels, texts, LIGHT["share"], 0.6)


def draw_attribution(shown: Overview) -> Figure:
    """Draw how much each token raises the log-probability of the prediction. InputError if it was not computed."""
    found = shown.attribution
    if found is None:
        raise InputError("this overview has no attribution: make it with attribute=True")
    figure = _bars(shown.labels, found.scores, "log-probability (nats)")
    figure.axes[0].set_title(f"log-probability of {found.target.label!r}", **_PLAIN)
    return figure


def draw_patching(shown: Overview) -> Figure:
    """Draw the table of patching, in nats. InputError if it was not computed."""
    found = shown.patching
    if found is None:
        raise InputError("this overview has no patching: make it with patch_from=TEXT")
    colours = (*LIGHT["share"][:5], *LIGHT["surprisal"])
    levels = [[min(share_level(abs(v)), 4) + (0 if v >= 0 else 5) for v in row] for row in found.shares.tolist()]
    labels = [a if a == b else f"{a} ← {b}" for a, b in zip(shown.labels, found.labels, strict=True)]
    return _grid(labels, levels, [[signed(v) for v in row] for row in found.changes.tolist()], colours, 0.45)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=7)
    return figure, ax


def _colours() -> Any:
    """From the background to the accent, as in the page."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("attention", [LIGHT["card"], LIGHT["accent"]])


def _tokens_below(ax: Axes, labels: Sequence[str]) -> None:
    ax.set_xticks(range(len(labels)), labels, rotation=90, **_PLAIN)


def _bars(names: Sequence[str], values: Sequence[float], label: str) -> Figure:
    figure, ax = _figure(4.5, max(1.2, _ROW * len(names) + 0.8))
    ax.barh(range(len(names)), values, color=[LIGHT["positive" if value >= 0 else "negative"] for value in values])
    ax.set_yticks(range(len(names)), names, **_PLAIN)
    ax.invert_yaxis()
    ax.set_xlabel(label, fontsize=8)
    return figure


def _grid(
    labels: Sequence[str], levels: list[list[int]], texts: list[list[str]], colours: Sequence[str], width: float
) -> Figure:
    """A table of layers and tokens, in which `levels` are the places of the cells' colours."""
    from matplotlib.colors import ListedColormap

    figure, ax = _figure(width * len(labels) + 0.8, 0.25 * len(levels) + 1.2)
    ax.imshow(levels, cmap=ListedColormap(list(colours)), vmin=-0.5, vmax=len(colours) - 0.5, aspect="auto")
    for layer, row in enumerate(texts):
        for place, text in enumerate(row):
            ax.text(place, layer, text[:10], ha="center", va="center", **{**_PLAIN, "fontsize": 6})
    _tokens_below(ax, labels)
    ax.set(yticks=range(len(levels)), ylabel="layer")
    return figure
