"""Reports of a training run: progress bar, logs of its metrics, and loss.png. Depends on numbers, not on the model."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

from gpt2.training.run_logs import RunLog, open_logs, read_metrics
from gpt_config.atomic_write import atomic_write
from gpt_config.errors import GPT2Warning


class Progress:
    """Reports one run to `folder` and to standard error. Use it in a `with` block.

    The bar is shown on a terminal and in a notebook. Elsewhere, for example in a file, only lines of text are written.
    `first_step` is the step at which the run starts or is resumed; `is_measured`, `logs` and `about` see `open_logs`.
    If standard error is closed or its disk is full, the run continues without reports there.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        max_steps: int,
        *,
        is_measured: bool = True,
        is_quiet: bool = False,
        logs: Sequence[str | RunLog] = (),
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._logs = open_logs(logs, folder, first_step, is_measured=is_measured, about=about or {})
        self._stream = SteadyStream(sys.stderr)
        self._bar = tqdm(
            total=max_steps, initial=first_step, unit="step", file=self._stream, dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=is_quiet or None,  # None: no bar if stderr is not a terminal, because a file would get carriage returns
        )  # fmt: skip
        self._is_quiet = is_quiet

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        for log in self._logs:
            fail = getattr(log, "fail", None)
            if kind is not None and fail is not None:
                fail()
            log.close()

    def step(self, loss: float, tokens_per_second: float, peak_share: float | None) -> None:
        """Advance the bar by one step."""
        of_peak = "" if peak_share is None else f", {peak_share:.0%} of peak"
        self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s{of_peak}", False)
        self._bar.update()

    def record(self, values: Mapping[str, Any]) -> None:
        """Write `values`, which contain "step", to metrics.jsonl and all other logs. WriteError if the disk is full."""
        others = {name: value for name, value in values.items() if name != "step"}
        for log in self._logs:
            log.log(values["step"], others)

    def say(self, text: str) -> None:
        """Write a line to standard error, above the bar if there is one; nothing if the run is quiet."""
        if not self._is_quiet:
            self._bar.write(text, file=self._stream)


class SteadyStream:
    """A text stream to which writing never fails: what `stream` cannot take is lost. `stream` may be None.

    Standard error ends before the run if its reader is gone, its terminal is closed or its disk is full.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` if the stream takes it. Returns its length."""
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):  # ValueError: the stream was closed
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it can be flushed."""
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
        points = [(line["step"], line[name]) for line in lines if type(line.get(name)) in (int, float)]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(folder / "loss.png", lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
