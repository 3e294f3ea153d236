"""An engine in a separate process. It knows no particular engine."""

from __future__ import annotations

from pathlib import Path

from gpt2.benchmark.engine import Place, Prompts
from gpt2.benchmark.engines import open_engine
from gpt2.benchmark.processes import Apart
from gpt2.benchmark.subject import Subject


class EngineApart(Apart):
    """The engine that `engines.open_engine` opens, in another process. LeftOutError if it cannot take part or fails."""

    def __init__(self, name: str, path: Path, subject: Subject, dtype: str, place: Place) -> None:
        self.name, self.dtype = name, dtype
        super().__init__(open_engine, name, path, subject, dtype, place)

    def generate(self, prompts: Prompts, n_new: int) -> list[list[int]]:
        """The same as `Engine.generate`."""
        ids: list[list[int]] = self.ask("generate", prompts, n_new)
        return ids
