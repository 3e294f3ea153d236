"""What an engine is: a model in memory that generates token ids. Interfaces only; it knows no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpt2.benchmark.subject import Subject

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Place:
    """Where an engine computes."""

    threads: int
    device: str = "cpu"


class Engine(Protocol):
    """A model in memory, ready to generate."""

    name: str
    dtype: str

    def generate(self, prompts: Prompts, n_new: int) -> list[list[int]]:
        """The greedy `n_new` tokens after each prompt; no token ends a text early."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


class OpenableEngine(Engine, Protocol):
    """An engine that is opened in two steps. Both raise LeftOutError for a dtype that the engine does not have."""

    def __init__(self, path: Path, subject: Subject, dtype: str, place: Place) -> None:
        """Read what `prepare` has written."""

    @staticmethod
    def prepare(subject: Subject, dtype: str) -> Path:
        """Write the subject in the engine's own format; returns the path."""
        ...


class OpenEngine(Protocol):
    """A function or class that opens the engine of a name on what `prepare` has written."""

    def __call__(self, name: str, path: Path, subject: Subject, dtype: str, place: Place, /) -> Engine:
        """LeftOutError if the engine cannot take part."""
        ...
