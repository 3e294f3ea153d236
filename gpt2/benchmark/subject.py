"""The model that all engines receive: float32 weights and a tokenizer in a temporary folder. It knows no engine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from gpt_config.errors import WriteError
from gpt_config.file_reading import read_json
from gpt_config.model_config import PRESETS, GPT2Config

if TYPE_CHECKING:
    from gpt2.pretrained import GPT2
    from gpt_encoder.interface import Tokenizer

# Factors for random weights. Weights as initialised for training repeat the last token of the prompt, which any engine gets
# right. With larger matrices and position embeddings the text varies: of 56 tokens, 39 differ.
_MATRICES = 3.0
_POSITIONS = 10.0


@dataclass(frozen=True)
class Subject:
    """`folder` contains the model. Engines write it in their own formats to `work`."""

    folder: Path
    work: Path

    @cached_property
    def config(self) -> GPT2Config:
        return GPT2Config.from_folder(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from gpt_encoder.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    @cached_property
    def token_strings(self) -> list[str]:
        """The token of each id, in the printable alphabet of vocab.json."""
        vocabulary = read_json(self.folder / "vocab.json")
        names = {token_id: name for name, token_id in vocabulary.items()}
        return [names[token_id] for token_id in range(len(names))]


def make_subject(name: str | None, preset: str, seed: int, work: Path) -> Subject:
    """Save the model `name`, or a random one in the shape of `preset` if it is None, as one safetensors file in `work`."""
    from gpt2.pretrained import load_model
    from gpt2.weights.tokenizer import load_tokenizer_for
    from gpt_encoder.tokenizer import GPT2Tokenizer

    model = random_model(GPT2Config.preset(preset), seed) if name is None else load_model(name)
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2") if name is None else load_tokenizer_for(model)
    model.save_pretrained(work / "model", tokenizer=tokenizer)
    return Subject(work / "model", work)


def random_model(config: GPT2Config, seed: int) -> GPT2:
    """A model in eval mode with random weights, whose greedy text does not repeat one token."""
    import torch

    from gpt2.pretrained import GPT2

    torch.manual_seed(seed)
    model = GPT2(config).eval()
    with torch.no_grad():
        model.wpe.weight.mul_(_POSITIONS)
        for parameter in model.h.parameters():
            if parameter.dim() == 2:
                parameter.mul_(_MATRICES)
    return model


def is_preset(size: str) -> bool:
    """Whether `size` is a preset, for which random weights are drawn, and not the name of a model."""
    return size in PRESETS


@contextlib.contextmanager
def temporary_folder(last_words: Callable[[], object] = lambda: None, root: Path | None = None) -> Iterator[Path]:
    """A folder in `root` that is removed afterwards, also if Ctrl-C or SIGTERM ends the process: it may contain gigabytes.

    `last_words` is called before such an end. The process ends even if it raises an error. WriteError if no folder can be
    made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="gpt2-benchmark-", dir=root))
    except OSError as error:
        raise WriteError(
            f"cannot make a temporary folder ({error}): free disk space, or set TMPDIR to another folder"
        ) from None

    def end(number: int, frame: FrameType | None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for each in before:  # a second signal ends the process at once
            signal.signal(each, signal.SIG_DFL)
        try:
            last_words()
        finally:
            os.kill(os.getpid(), number)  # ends the process; a library could catch an exception

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def prompt_rows(subject: Subject, text: str, lengths: list[int]) -> list[list[int]]:
    """Prompts of these lengths in tokens: consecutive parts of the text, which starts again when it ends."""
    ids = subject.tokenizer.encode(text)
    rows, place = [], 0
    for length in lengths:
        rows.append([ids[(place + offset) % len(ids)] for offset in range(length)])
        place += length
    return rows
