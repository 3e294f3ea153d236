"""Reports of a training run: progress bar, metrics.jsonl, TensorBoard and loss.png. Depends on numbers, not on the model."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

from gpt_config.atomic_write import atomic_write, atomic_write_text
from gpt_config.errors import GPT2Warning, Remedy, WriteError
from gpt_config.file_reading import parse_json, read_text

METRICS_FILE = "metrics.jsonl"


class Progress:
    """Reports one run to `folder` and to standard error. Use it in a `with` block.

    The bar is shown on a terminal and in a notebook. Elsewhere, for example in a file, only lines of text are written.
    `first_step` is the step at which the run starts or is resumed. Metrics of later steps are dropped, because those steps
    are done again.
    """

    def __init__(
        self, folder: Path, first_step: int, max_steps: int, *, is_quiet: bool = False, tensorboard: bool = False
    ) -> None:
        self._path = folder / METRICS_FILE
        self._tensorboard = _tensorboard_writer(folder) if tensorboard else None
        kept = [line for line in read_metrics(folder) if line["step"] <= first_step]
        atomic_write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file: TextIO = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self._bar = tqdm(
            total=max_steps, initial=first_step, unit="step", file=sys.stderr, dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=is_quiet or None,  # None: no bar if stderr is not a terminal, because a file would get carriage returns
        )  # fmt: skip
        self._is_quiet = is_quiet

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        with contextlib.suppress(OSError):  # a full disk, which the error that ends the run already reports
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def step(self, loss: float, tokens_per_second: float, peak_share: float | None) -> None:
        """Advance the bar by one step."""
        of_peak = "" if peak_share is None else f", {peak_share:.0%} of peak"
        self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s{of_peak}", False)
        self._bar.update()

    def record(self, values: Mapping[str, Any]) -> None:
        """Append `values`, which contain "step", to metrics.jsonl. WriteError if the disk is full."""
        try:
            self._file.write(json.dumps(dict(values)) + "\n")
            self._file.flush()
        except OSError as error:
            raise WriteError(
                f"cannot write {self._path} ({error.strerror}): free disk space, then resume the run",
                remedy=Remedy("resume", str(self._path.parent)),
            ) from None
        if self._tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._tensorboard.add_scalar(name, value, values["step"])

    def say(self, text: str) -> None:
        """Write a line to standard error, above the bar if there is one; nothing if the run is quiet."""
        if not self._is_quiet:
            self._bar.write(text, file=sys.stderr)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl. Lines that a killed process left incomplete are ignored."""
    lines = []
    with contextlib.suppress(OSError, ValueError):
        for line in read_text(folder / METRICS_FILE).splitlines():
            lines.append(parse_json(line))
    return [values for values in lines if isinstance(values, dict) and isinstance(values.get("step"), int)]


def plot_losses(folder: Path) -> None:
    """Draw `folder`/loss.png from its metrics.jsonl. Without matplotlib, a warning says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        message = "no loss.png, because matplotlib is not installed: pip install '.[train]'"
        warnings.warn(message, GPT2Warning, 2)
        return
    lines = read_metrics(folder)
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name, label in (("loss", "training"), ("validation_loss", "validation")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(folder / "loss.png", lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        message = "no TensorBoard log, because tensorboard is not installed: pip install '.[train]'"
        warnings.warn(message, GPT2Warning, 2)
        return None
    return SummaryWriter(str(folder / "tensorboard"))
