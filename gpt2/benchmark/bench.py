"""The object that each section of a benchmark receives: settings, model, texts and results. It measures nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpt2.benchmark.engine import OpenEngine, Place
from gpt2.benchmark.engine_process import EngineApart
from gpt2.benchmark.machine import free_memory, installed_version
from gpt2.benchmark.processes import run_python
from gpt2.benchmark.results import Results
from gpt2.benchmark.settings import Settings
from gpt2.benchmark.subject import Subject
from gpt2.benchmark.texts import Texts

if TYPE_CHECKING:
    import torch

Say = Callable[[str], None]


class Measure(NamedTuple):
    """The sections that one call of `run` measures."""

    sections: tuple[str, ...]
    run: Callable[[Bench], None]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The replaceable parts of a benchmark. The defaults are those of `gpt2 benchmark`; tests replace some."""

    open_engine: OpenEngine = EngineApart  # opens the engines of decode, prefill and batch
    run_python: Callable[[list[str], int], str] = run_python  # runs the processes of load and scaling
    installed_version: Callable[[str], str | None] = installed_version
    free_memory: Callable[[], int | None] = free_memory  # bytes; limits the models of scaling
    measures: Sequence[Measure] | None = None  # None: all sections
    temporary_root: Path | None = None  # parent of the temporary folder; None: Python's default


@dataclasses.dataclass
class Bench:
    """What each section receives. `say` prints a line of progress for the user."""

    settings: Settings
    subject: Subject
    texts: Texts
    results: Results
    say: Say
    parts: Parts = dataclasses.field(default_factory=Parts)

    @property
    def place(self) -> Place:
        """The threads and the device of the engines."""
        return Place(self.settings.threads, self.settings.device)

    @property
    def device(self) -> torch.device:
        """The device of the engines as a torch.device."""
        import torch

        return torch.device(self.settings.device)

    @property
    def pause(self) -> float:
        """Seconds to wait between two engines, because some keep several threads spinning for a while after their work."""
        return 0.0 if self.settings.threads == 1 else 0.25
