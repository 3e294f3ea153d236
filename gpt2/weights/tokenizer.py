"""Which tokenizer belongs to a model. It knows where to look, not how text is encoded."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from gpt_config.errors import GPT2Warning, InputError, Remedy, VocabularyError
from gpt_config.model_config import GPT2Config
from gpt_encoder.tokenizer import GPT2Tokenizer, has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from gpt2.model import GPT2
    from gpt_encoder.interface import Tokenizer


def folder_of(model: GPT2) -> Path | None:
    """The folder that `from_pretrained` read the model from; None for a model that was made otherwise."""
    return getattr(model, "pretrained_from", None)


def tokenizer_of(model: GPT2) -> Tokenizer | None:
    """The tokenizer in the folder the model was loaded from, or None.

    Where there is no tokenizer and the vocabulary has the size of OpenAI's, it is taken for OpenAI's.
    """
    folder = folder_of(model)
    if folder is not None and has_tokenizer(folder):
        return load_tokenizer(folder)
    if model.config.vocab_size != GPT2Config().vocab_size:
        return None
    if folder is not None:
        warnings.warn(f"{folder} has no tokenizer files: OpenAI's vocabulary, which has its size, is used", GPT2Warning, 2)
    return GPT2Tokenizer.from_pretrained()


def load_tokenizer_for(model: GPT2, name_or_folder: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer of `name_or_folder`, or else the model's own.

    VocabularyError if the model has none; InputError if the tokenizer has ids that the model lacks.
    """
    tokenizer = load_tokenizer(name_or_folder) if name_or_folder else tokenizer_of(model)
    if tokenizer is None:
        raise VocabularyError(
            f"{folder_of(model)} has no tokenizer files: name a tokenizer, such as gpt2", remedy=Remedy("tokenizer", "gpt2")
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {model.config.vocab_size}: "
            "use the tokenizer that belongs to the model"
        )
    return tokenizer
