"""CTranslate2, out: by its own converter, which reads a model folder with transformers.

Needs the packages ctranslate2 and transformers.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2.formats import ctranslate2_file
from gpt2.formats.hub_files import write_hub_files
from gpt2.formats.stored import Stored
from gpt2.weights.writing import write_weights
from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import CheckpointError, InputError
from gpt_encoder.interface import EOT_TOKEN

if TYPE_CHECKING:
    from gpt2.model import GPT2
    from gpt_config.model_config import GPT2Config
    from gpt_encoder.interface import Tokenizer

TITLE = "a CTranslate2 model"
DTYPES = ("float32", "float16", "bfloat16", "int8")
IS_FOLDER = True


def write(model: GPT2, tokenizer: Tokenizer | None, path: Path, dtype: str) -> None:
    """Write the folder of a model and its tokenizer. InputError for what CTranslate2 cannot say."""
    _check_computes(model.config, tokenizer)
    source, converted = path / "source", path / "converted"
    source.mkdir()
    write_weights(source, model.state_dict())
    write_hub_files(model, tokenizer, source)
    with _needed("writing CTranslate2"):
        _convert(source, converted, model.config, dtype)
    for file in (*converted.iterdir(), *source.glob("tokenizer*.json")):  # programs make the tokens of a text themselves
        shutil.move(file, path / file.name)
    shutil.rmtree(source)
    converted.rmdir()


def _convert(source: Path, converted: Path, config: GPT2Config, dtype: str) -> None:
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc]
        """Names rows that have no token, because each row needs a name."""

        def load_tokenizer(self, *arguments: Any, **options: Any) -> Any:
            tokenizer = super().load_tokenizer(*arguments, **options)
            tokenizer.add_tokens([f"[unused {number}]" for number in range(config.vocab_size - len(tokenizer))])
            return tokenizer

    with _quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Converter(str(source)).convert(str(converted), quantization=None if dtype == "float32" else dtype)
        except (ValueError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"CTranslate2's converter refuses this model ({reason:.300}): choose another format") from None
    settings = json.loads((converted / "config.json").read_text(encoding="utf-8"))
    for role in ("bos_token", "eos_token", "unk_token"):
        settings[role] = settings[role] or EOT_TOKEN  # CTranslate2 needs all three
    settings["dtype"] = dtype  # CTranslate2 does not read it
    settings["layer_norm_epsilon"] = config.layer_norm_epsilon  # the converter of GPT-2 leaves it out
    atomic_write_json(converted / "config.json", settings)


def _check_computes(config: GPT2Config, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        raise InputError(f"{TITLE} needs a tokenizer: name one, or choose another format")
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size} rows: "
            "use the tokenizer of this model"
        )
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        raise InputError("CTranslate2 scales attention by the root of the width of a head only: choose another format")


def stored_weights(path: Path) -> list[Stored]:
    """Return the weights of a written model. CheckpointError if it is damaged."""
    return list(ctranslate2_file.stored_weights(path / "model.bin"))


class Engine:
    """A written model, run by CTranslate2 on the CPU in the dtype of the file, or in float32 for half precision."""

    def __init__(self, path: Path) -> None:
        """Load the model. CheckpointError if it cannot be read."""
        import ctranslate2

        try:
            self._generator = ctranslate2.Generator(str(path), device="cpu", intra_threads=torch.get_num_threads())
            with open(next(path.glob("*vocabulary.json")), encoding="utf-8") as file:
                self._tokens: list[str] = json.load(file)
            settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        # A C++ exception comes as any of these: a missing weight is an IndexError.
        except (ArithmeticError, LookupError, MemoryError, RuntimeError, OSError, ValueError, StopIteration) as error:
            raise CheckpointError(f"{path} is not a readable CTranslate2 model ({error}): write it again") from None
        # A processor without a dtype computes in float32, with the rounded weights.
        self.precision = str(settings.get("dtype") or self._generator.compute_type.partition("_")[0])

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V), float32, of ids (B, T)."""
        import numpy as np

        found = self._generator.forward_batch([self._named(row) for row in ids.tolist()])
        return torch.from_numpy(np.array(found, dtype=np.float32))

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """Return the `n_new` greedy ids after `prompt`."""
        [result] = self._generator.generate_batch(
            [self._named(prompt)], max_length=n_new, min_length=n_new, beam_size=1, sampling_topk=1,
            include_prompt_in_result=False, end_token=[],
        )  # fmt: skip
        ids: list[int] = result.sequences_ids[0]
        return ids

    def _named(self, ids: list[int]) -> list[str]:
        return [self._tokens[token_id] for token_id in ids]


def load_engine(path: Path) -> Engine:
    """Return what runs the folder `path`. InputError if ctranslate2 is not installed."""
    with _needed("running CTranslate2"):
        return Engine(path)


@contextlib.contextmanager
def _needed(what: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        package = (error.name or "ctranslate2").partition(".")[0]
        raise InputError(f"{what} needs {package}: pip install '.[ctranslate2]'") from None


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Let transformers print nothing but errors."""
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()
