"""Engines: what generates the tokens. The interface, our own engine, and how one is opened. Peers stand in peers.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from gpt2.benchmark.machine import free_memory, n_parameters
from gpt2.benchmark.results import LeftOutError
from gpt2.benchmark.settings import DTYPES, OURS
from gpt2.benchmark.subject import Subject
from gpt_config.errors import DeviceError

Prompts = Sequence[Sequence[int]]

# A peer's module and class; it is imported when the peer takes part.
_PEERS = {"transformers": "TransformersEngine", "ctranslate2": "CTranslate2Engine", "llama-cpp-python": "LlamaEngine"}


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
        """The most probable `n_new` tokens after each prompt, one after another; none of them ends a text."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class OpenableEngine(Engine, Protocol):
    """One that is opened in two steps, each of which raises LeftOutError for a dtype that the engine does not have."""

    def __init__(self, path: Path, subject: Subject, dtype: str, place: Place) -> None:
        """Read what `prepare` has made."""

    @staticmethod
    def prepare(subject: Subject, dtype: str) -> Path:
        """Put the subject into the engine's own format; returns where it is."""
        ...


class OurEngine:
    """This package."""

    name = OURS

    @staticmethod
    def prepare(subject: Subject, dtype: str) -> Path:
        """The folder as it is."""
        return subject.folder

    def __init__(self, path: Path, subject: Subject, dtype: str, place: Place) -> None:
        import torch

        from gpt2.pretrained import GPT2

        torch.set_num_threads(place.threads)
        self.dtype = dtype
        try:
            self._model = GPT2.from_pretrained(path, device=place.device, dtype=dtype)
        except DeviceError as error:
            raise LeftOutError(f"not available: {error}") from None

    def generate(self, prompts: Prompts, n_new: int) -> list[list[int]]:
        """By GPT2.generate: one call for all prompts, the shorter ones padded on the left."""
        import torch

        longest = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids = self._model.generate(input_ids, attention_mask=mask, max_new_tokens=n_new, stop_at_eot=False)
        return ids[:, longest:].tolist()

    def close(self) -> None:
        """Drop the model."""
        del self._model


def generating_engines(peers: Sequence[str]) -> list[str]:
    """Ours and those of the peers that generate."""
    return [OURS, *(name for name in peers if name in _PEERS)]


def prepare_engine(name: str, subject: Subject, dtype: str) -> Path:
    """Put the subject into the format of the engine of that name. LeftOutError if it cannot take part."""
    return _engine_class(name).prepare(subject, dtype)


def open_engine(name: str, path: Path, subject: Subject, dtype: str, place: Place) -> Engine:
    """The engine of that name, on what it has prepared. LeftOutError if it cannot take part, or has no room."""
    needed, free = n_parameters(subject.config) * DTYPES[dtype], free_memory(place.device)
    if free is not None and needed > free:
        raise LeftOutError(f"no room: its weights take {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")
    return _engine_class(name)(path, subject, dtype, place)


def _engine_class(name: str) -> type[OpenableEngine]:
    if name == OURS:
        return OurEngine
    return getattr(import_module("gpt2.benchmark.peers"), _PEERS[name])
