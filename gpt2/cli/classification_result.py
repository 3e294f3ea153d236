"""Lines that show the result of a classifier: figures, and the confusion matrix. It computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_FIGURES = ("accuracy", "micro_f1", "macro_f1", "mse", "mae", "r2")


def result_lines(result: Mapping[str, Any], texts: str) -> Iterator[str]:
    """Yield the lines for a `Result.to_dict()`. `texts` says of what, such as "60 test texts"."""
    if "confusion" not in result:
        figures = ", ".join(f"{name} {result[name]:.4f}" for name in _FIGURES if result.get(name) is not None)
        yield f"{figures} on {texts}"
        yield from (f"F1 of {label}: {value:.4f}" for label, value in result.get("f1", {}).items())
        return
    yield f"accuracy {result['accuracy']:.4f} on {texts}, macro F1 {result['macro_f1']:.4f}"
    labels = result["labels"]
    width = max(8, *map(len, labels))
    yield "texts by label (rows) and predicted label (columns):"
    yield " " * width + "".join(f"  {label:>{width}}" for label in labels) + "        F1"
    for label, row in zip(labels, result["confusion"], strict=True):
        yield f"{label:{width}}" + "".join(f"  {count:{width}}" for count in row) + f"    {result['f1'][label]:.4f}"
