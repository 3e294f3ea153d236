"""Interfaces of an engine: a model in memory that generates token ids. It knows no particular engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpt2.benchmark.subject import Subject

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Place:
    """The number of threads and the device of an engine."""

    threads: int
    device: str = "cpu"


class Engine(Protocol):
    """A model in memory, ready to generate."""

    name: str
    dtype: str

    def generate(self, prompts: Prompts, n_new: int) -> list[list[int]]:
        """The `n_new` greedy tokens after each prompt. No token ends a text early."""
        ...

    def close(self) -> None:
        """Free the memory of the model."""
        ...


class OpenableEngine(Engine, Protocol):
    """An engine that is opened in two steps. Both raise LeftOutError for a dtype that the engine does not support."""

    def __init__(self, path: Path, subject: Subject, dtype: str, place: Place) -> None:
        """Load the files that `prepare` wrote to `path`."""

    @staticmethod
    def prepare(subject: Subject, dtype: str) -> Path:
        """Write the subject in the engine's own format. Returns the path."""
        ...


class OpenEngine(Protocol):
    """A function or class that opens an engine by its name, with the files that `prepare` wrote."""

    def __call__(self, name: str, path: Path, subject: Subject, dtype: str, place: Place, /) -> Engine:
        """The opened engine. LeftOutError if it cannot take part."""
        ...
