"""The model that all engines are given: a folder of float32 weights with a tokenizer, in a place that is gone afterwards."""

from __future__ import annotations

import contextlib
import json
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
from gpt_config.model_config import PRESETS, GPT2Config

if TYPE_CHECKING:
    from gpt2.pretrained import GPT2
    from gpt_encoder.interface import Tokenizer

# Weights as they are drawn for training repeat the last token of the prompt for ever, which any engine gets right. With
# matrices and positions that say more, texts wander: of 56 tokens 39 differ.
_MATRICES, _POSITIONS = 3.0, 10.0


@dataclass(frozen=True)
class Subject:
    """`folder` holds the model; in `work` engines put it in their own formats."""

    folder: Path
    work: Path

    @cached_property
    def config(self) -> GPT2Config:
        return GPT2Config.from_json_file(self.folder / "config.json")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from gpt_encoder.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    @cached_property
    def token_strings(self) -> list[str]:
        """The token of each id, in the printable alphabet of the vocabulary files."""
        vocabulary = json.loads((self.folder / "vocab.json").read_text(encoding="utf-8"))
        names = {token_id: name for name, token_id in vocabulary.items()}
        return [names[token_id] for token_id in range(len(names))]


def make_subject(name: str | None, preset: str, seed: int, work: Path) -> Subject:
    """The model `name`, or one of random weights in the shape of `preset`, as one safetensors file in `work`."""
    from gpt2.pretrained import load_model
    from gpt2.weights.tokenizer import load_tokenizer_for
    from gpt_encoder.tokenizer import GPT2Tokenizer

    model = random_model(GPT2Config.preset(preset), seed) if name is None else load_model(name)
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2") if name is None else load_tokenizer_for(model)
    model.save_pretrained(work / "model", tokenizer=tokenizer)
    return Subject(work / "model", work)


def random_model(config: GPT2Config, seed: int) -> GPT2:
    """A model whose greedy texts do not repeat themselves from the start."""
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
    """Whether a size names a shape, of which random weights are drawn, and not a model."""
    return size in PRESETS


@contextlib.contextmanager
def temporary_folder(last_words: Callable[[], object] = lambda: None, root: Path | None = None) -> Iterator[Path]:
    """A folder in `root` that is removed afterwards, also if Ctrl-C or SIGTERM ends the process: it may hold gigabytes.

    `last_words` is called before such an end. Whatever it raises, the process ends.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="gpt2-benchmark-", dir=root))
    except OSError as error:
        raise WriteError(f"cannot make a temporary folder ({error}): make room, or set TMPDIR to another place") from None

    def end(number: int, frame: FrameType | None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for each in before:  # the next one ends it at once
            signal.signal(each, signal.SIG_DFL)
        try:
            last_words()
        finally:
            os.kill(os.getpid(), number)  # as if it had not been caught: no exception could get lost in a library

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def prompt_rows(subject: Subject, text: str, lengths: list[int]) -> list[list[int]]:
    """Prompts of these lengths: one stretch of the text after another, from its start again where it ends."""
    ids = subject.tokenizer.encode(text)
    rows, place = [], 0
    for length in lengths:
        rows.append([ids[(place + offset) % len(ids)] for offset in range(length)])
        place += length
    return rows
