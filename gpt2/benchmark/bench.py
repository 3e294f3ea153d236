"""What each section of a benchmark is given: settings, the model, texts, and where results go. It measures nothing."""

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
    """The sections that `run` measures, in one call."""

    sections: tuple[str, ...]
    run: Callable[[Bench], None]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a benchmark is made of. The defaults are those of `gpt2 benchmark`; tests exchange some."""

    open_engine: OpenEngine = EngineApart  # the engines of decode, prefill and batch
    run_python: Callable[[list[str], int], str] = run_python  # the processes of load and scaling
    installed_version: Callable[[str], str | None] = installed_version
    free_memory: Callable[[], int | None] = free_memory  # bytes, for the models of scaling
    measures: Sequence[Measure] | None = None  # None: those of all sections
    temporary_root: Path | None = None  # where the temporary folder is made; None: where Python makes them


@dataclasses.dataclass
class Bench:
    """What each section is given. `say` tells the user what is being done."""

    settings: Settings
    subject: Subject
    texts: Texts
    results: Results
    say: Say
    parts: Parts = dataclasses.field(default_factory=Parts)

    @property
    def place(self) -> Place:
        """Where engines compute."""
        return Place(self.settings.threads, self.settings.device)

    @property
    def device(self) -> torch.device:
        """The same as a torch.device."""
        import torch

        return torch.device(self.settings.device)

    @property
    def pause(self) -> float:
        """Seconds between two engines: with several threads, some still spin after their work."""
        return 0.0 if self.settings.threads == 1 else 0.25
