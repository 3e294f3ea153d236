"""The list of engines, and how one is opened. It contains our own engine; those of other packages are in peers.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpt2.benchmark.engine import Engine, OpenableEngine, Place, Prompts
from gpt2.benchmark.machine import free_memory
from gpt2.benchmark.peers import CTranslate2Engine, LlamaEngine, TransformersEngine
from gpt2.benchmark.results import LeftOutError
from gpt2.benchmark.settings import DTYPES, OURS
from gpt2.benchmark.subject import Subject
from gpt2.weights.folder import locate_model
from gpt_config.cores import spin_as_usual
from gpt_config.errors import DeviceError


class OurEngine:
    """The engine of this package."""

    name = OURS

    @staticmethod
    def prepare(subject: Subject, dtype: str) -> Path:
        """The subject's folder, unchanged."""
        return subject.folder

    def __init__(self, path: Path, subject: Subject, dtype: str, place: Place) -> None:
        locate_model(path)  # raises an error before torch is imported, which takes seconds
        import torch

        from gpt2.pretrained import GPT2

        torch.set_num_threads(place.threads)
        self.dtype = dtype
        try:
            self._model = GPT2.from_pretrained(path, device=place.device, dtype=dtype)
        except DeviceError as error:
            raise LeftOutError(f"not available: {error}") from None

    def generate(self, prompts: Prompts, n_new: int) -> list[list[int]]:
        """Ids from GPT2.generate: one call for all prompts, padded on the left."""
        import torch

        longest = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids = self._model.generate(input_ids, attention_mask=mask, max_new_tokens=n_new, stop_at_eot=False)
        return ids[:, longest:].tolist()

    def close(self) -> None:
        """Free the memory of the model."""
        del self._model


# Engines by the names of their packages. A package is imported only when its engine is prepared or opened.
_ENGINES: dict[str, type[OpenableEngine]] = {
    OURS: OurEngine,
    "transformers": TransformersEngine,
    "ctranslate2": CTranslate2Engine,
    "llama-cpp-python": LlamaEngine,
}


def generating_engines(peers: Sequence[str]) -> list[str]:
    """The names of our engine and of the `peers` that generate text."""
    return [OURS, *(name for name in peers if name in _ENGINES)]


def prepare_engine(name: str, subject: Subject, dtype: str) -> Path:
    """Write the subject in the format of the engine `name`. Returns the path. LeftOutError if it cannot take part."""
    return _ENGINES[name].prepare(subject, dtype)


def open_engine(name: str, path: Path, subject: Subject, dtype: str, place: Place) -> Engine:
    """The engine `name`, loaded from its prepared files. LeftOutError if it cannot take part or needs too much memory."""
    needed, free = subject.config.n_parameters * DTYPES[dtype], free_memory(place.device)
    if free is not None and needed > free:
        raise LeftOutError(f"not enough memory: its weights need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    if name != OURS:
        spin_as_usual()  # what `gpt2` sets for itself would change how another program computes
    return _ENGINES[name](path, subject, dtype, place)
