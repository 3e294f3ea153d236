"""Draws docs/images/shakespeare.svg from docs/training_logs/shakespeare_char.jsonl: run it after the log changes."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[1]
GREY = "#808080"  # equally readable on white and on the site's dark background, which shows through
LINES = (("loss", "training", "#3b82c4", 1.0), ("validation_loss", "validation", "#e07b00", 2.0))


def main() -> None:
    """Write the picture; the same log gives the same file."""
    log = (DOCS / "training_logs" / "shakespeare_char.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in log.splitlines()]
    # Texts stay texts, in the reader's font; ids and the date would differ each time.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "shakespeare", "font.family": "sans-serif"})
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, label, color, width in LINES:
        points = [(record["step"], record[name]) for record in records if name in record]
        marker = "o" if name == "validation_loss" else ""
        axes.plot(*zip(*points, strict=True), label=label, color=color, linewidth=width, marker=marker, markersize=5)
    axes.axhline(1.47, color=GREY, linewidth=1, linestyle="--")
    axes.annotate("1.47, nanoGPT's validation loss", (0, 1.47), (0, -13), textcoords="offset points", ha="left", color=GREY)
    axes.set_xlabel("step", color=GREY)
    axes.set_ylabel("loss (nats per character)", color=GREY)
    axes.set_ylim(1, 4.5)
    axes.tick_params(colors=GREY)
    axes.grid(color=GREY, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.legend(frameon=False, labelcolor=GREY)
    figure.savefig(DOCS / "images" / "shakespeare.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
