"""Where the metrics of a run go: metrics.jsonl, TensorBoard, Weights & Biases, or an object of the caller's. Numbers only.

metrics.jsonl is the run's own record, which resumption and loss.png read: a run ends if it cannot be written. Every other
log is a copy: if it fails, a warning says so, and the run goes on without it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TextIO

from gpt_config.atomic_write import atomic_write_json, atomic_write_text
from gpt_config.errors import GPT2Warning, InputError, Remedy, WriteError
from gpt_config.file_reading import open_regular, parse_json, read_json
from gpt_config.json_text import to_json
from gpt_config.training_config import LOGS
from gpt_config.validation import check_choice

METRICS_FILE = "metrics.jsonl"
WANDB_FILE = "wandb.json"  # the id of the run at Weights & Biases, under which a resumed run goes on


class RunLog(Protocol):
    """Takes the metrics of a run. Any object with these two methods is one.

    A third method without arguments, `fail`, is called before `close` if an object has it and an error ends the run.
    """

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take the values after `step`: numbers by name, and the text "sample". A resumed run may do a step a second
        time."""

    def close(self) -> None:
        """Write out what is left. It is called once, at the end of the run, also if the run fails."""


class MetricsFile:
    """Appends a JSON object per line to `folder`/metrics.jsonl. WriteError if the disk is full.

    Metrics of steps after `first_step`, at which the run is resumed, are dropped, because those steps are done again.
    Without `is_measured`, so is the validation loss of `first_step`.
    """

    def __init__(self, folder: Path, first_step: int, *, is_measured: bool = True) -> None:
        self._path = folder / METRICS_FILE
        kept: dict[tuple[int, bool], dict[str, Any]] = {}
        for line in read_metrics(folder):
            is_validation = "validation_loss" in line
            if line["step"] < first_step or (line["step"] == first_step and (is_measured or not is_validation)):
                kept[line["step"], is_validation] = line  # once, also if an older version wrote it twice
        atomic_write_text(self._path, "".join(to_json(line) + "\n" for line in kept.values()))
        self._file: TextIO = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed in `close`)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line."""
        try:
            self._file.write(to_json({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise WriteError(
                f"cannot write {self._path} ({error.strerror}): free disk space, then resume the run",
                remedy=Remedy("resume", str(self._path.parent)),
            ) from None

    def close(self) -> None:
        """Close the file. A full disk is no error here, because the error that ends the run already reports it."""
        with contextlib.suppress(OSError):
            self._file.close()


class TensorBoardLog:
    """Writes the numbers into `folder`/tensorboard. Events of steps after `first_step` are dropped."""

    def __init__(self, folder: Path, first_step: int, about: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write each number."""
        for name, value in values.items():
            if isinstance(value, float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out the rest."""
        self._writer.close()


class WandbLog:
    """Sends the metrics to Weights & Biases; its variables, such as WANDB_PROJECT and WANDB_MODE, say where and how.

    `folder`/wandb.json keeps the id of the run, so that a resumed run goes on under it. `about` is the run's config there.
    """

    def __init__(self, folder: Path, first_step: int, about: Mapping[str, Any]) -> None:
        import wandb

        run_id = _stored_id(folder) or secrets.token_hex(8)
        name = {} if os.environ.get("WANDB_NAME") else {"name": folder.resolve().name}
        settings = wandb.Settings(console="off", silent=True)  # the terminal is this package's
        self._run: Any = wandb.init(
            id=run_id, resume="allow", dir=str(folder), config=dict(about), settings=settings, **name
        )
        # Its own counter may not go back, and steps after a checkpoint are done again when a run is resumed.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        atomic_write_json(folder / WANDB_FILE, {"id": run_id})
        self._exit_code = 0

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the values."""
        self._run.log({"step": step, **values})

    def fail(self) -> None:
        """Let `close` mark the run as failed, not as finished."""
        self._exit_code = 1

    def close(self) -> None:
        """Wait until all is sent, or in the offline mode, written."""
        self._run.finish(exit_code=self._exit_code)


_COPIES: Mapping[str, Callable[[Path, int, Mapping[str, Any]], RunLog]] = {
    "tensorboard": TensorBoardLog,
    "wandb": WandbLog,
}
_EXTRAS = {"tensorboard": "train", "wandb": "wandb"}  # the packages of the same name


def check_logs(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that is none of `LOGS`, and InputError if its package is not installed."""
    for name in names:
        check_choice("log", name, LOGS)
        if name in _COPIES and not _is_installed(name):
            raise InputError(
                f"log={name} needs the package {name}, which is not installed: pip install '.[{_EXTRAS[name]}]', or leave "
                f"{name} out"
            )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # sys.modules has None or a module without a spec
        return False


class SteadyLog:
    """A log whose failure does not end the run: a GPT2Warning says so once, and nothing more is sent to it.

    `open_log` is called at once, and may fail too.
    """

    def __init__(self, name: str, open_log: Callable[[], RunLog]) -> None:
        self._name, self._has_failed = name, False
        self._log: RunLog | None = None
        with self._going_on():
            self._log = open_log()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Pass the values on."""
        if self._log is not None and not self._has_failed:
            with self._going_on():
                self._log.log(step, values)

    def fail(self) -> None:
        """Tell the log that an error ends the run, if it has the method `fail`."""
        fail = getattr(self._log, "fail", None)
        if fail is not None:
            with self._going_on():
                fail()

    def close(self) -> None:
        """Close the log, also after a failure."""
        if self._log is not None:
            with self._going_on():
                self._log.close()

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._has_failed:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                warnings.warn(
                    f"the log {self._name} has failed ({reason}): the run goes on without it, and {METRICS_FILE} has all "
                    "metrics",
                    GPT2Warning,
                    2,
                )
            self._has_failed = True


def open_logs(
    logs: Sequence[str | RunLog], folder: Path, first_step: int, *, is_measured: bool, about: Mapping[str, Any]
) -> list[RunLog]:
    """Return metrics.jsonl and each other log once: that of a name of `LOGS`, or the object itself."""
    opened: list[RunLog] = [MetricsFile(folder, first_step, is_measured=is_measured)]
    for place, log in enumerate(logs):
        if not isinstance(log, str):
            opened.append(SteadyLog(type(log).__name__, partial(_itself, log)))
        elif log != "jsonl" and log not in logs[:place]:
            opened.append(SteadyLog(log, partial(_open, log, folder, first_step, about)))
    return opened


def _itself(log: RunLog) -> RunLog:
    return log


def _open(name: str, folder: Path, first_step: int, about: Mapping[str, Any]) -> RunLog:
    check_logs([name])
    return _COPIES[name](folder, first_step, about)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl. Lines that are damaged, or that a kill left incomplete, are ignored."""
    try:
        with open_regular(folder / METRICS_FILE) as file:
            lines = file.read().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            values = parse_json(line.decode("utf-8"))
            if isinstance(values, dict) and type(values.get("step")) is int:
                found.append(values)
    return found


def _stored_id(folder: Path) -> str:
    try:
        stored = read_json(folder / WANDB_FILE)
    except (OSError, ValueError):
        return ""
    run_id = stored.get("id") if isinstance(stored, dict) else None
    return run_id if isinstance(run_id, str) else ""
