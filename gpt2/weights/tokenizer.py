"""Finds the tokenizer of a model. It depends on folders and on `gpt_encoder`, which encodes text."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from gpt_config.errors import GPT2Warning, InputError, Remedy, VocabularyError
from gpt_config.model_config import GPT2Config
from gpt_encoder.token_files import other_tokenizer
from gpt_encoder.tokenizer import GPT2Tokenizer, has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gpt2.model import GPT2
    from gpt_encoder.interface import Tokenizer


def folder_of(model: GPT2) -> Path | None:
    """Return the folder that `from_pretrained` has read the model from, or None for a model made in another way."""
    return getattr(model, "pretrained_from", None)


def tokenizer_of(model: GPT2) -> Tokenizer | None:
    """Return the tokenizer in the folder that the model was loaded from, or None if there is none.

    If there is none and the vocabulary has the size of OpenAI's, it returns OpenAI's tokenizer; for a model that was loaded,
    a GPT2Warning is issued. A folder that names or contains another kind of tokenizer gives None.
    """
    folder = folder_of(model)
    if folder is not None and has_tokenizer(folder):
        return load_tokenizer(folder)
    if model.config.vocab_size != GPT2Config().vocab_size or (folder is not None and other_tokenizer(folder)):
        return None
    if folder is not None:
        warnings.warn(f"{folder} has no tokenizer files: OpenAI's tokenizer, of the same size, is used", GPT2Warning, 2)
    return GPT2Tokenizer.from_pretrained()


def load_tokenizer_for(model: GPT2, name_or_folder: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Return the tokenizer of `name_or_folder`, or the model's own if it is None. Its end token is that of the model.

    The end token is what config and tokenizer say: see `end_token`. A GPT2Warning is issued if generation with this model
    does not end at it, because the config names other tokens.

    The model's own may have more ids than the model, as after a token was added without resizing it: `check_ids` refuses a
    text that needs one. Of another tokenizer, only special tokens may be beyond, because its other tokens would then be
    those of another model. Raises VocabularyError if the model has none or one of another kind, and InputError if the other
    does not fit.
    """
    tokenizer = load_tokenizer(name_or_folder) if name_or_folder else tokenizer_of(model)
    if tokenizer is None:
        folder = folder_of(model)
        if folder is not None and (other := other_tokenizer(folder)):
            raise VocabularyError(other)
        raise VocabularyError(
            f"{folder_of(model)} has no tokenizer files: name a tokenizer, such as gpt2", remedy=Remedy("tokenizer", "gpt2")
        )
    n_rows = model.config.vocab_size
    if name_or_folder and tokenizer.vocab_size > n_rows:
        special = set(tokenizer.special_tokens.values())
        if any(token_id >= n_rows and token_id not in special for token_id in tokenizer.token_bytes):
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the model {n_rows}: "
                "use the tokenizer that belongs to the model"
            )
    tokenizer.end_token_id, ends = end_token(model.config, tokenizer), model.config.eos_token_ids
    if ends and tokenizer.end_token_id not in ends:
        warnings.warn(
            f"the config ends texts with {_named(ends[0], tokenizer)}, which is no special token of the tokenizer, and the "
            f"tokenizer with {_named(tokenizer.end_token_id, tokenizer)}: generation follows the config, all else the "
            "tokenizer; correct eos_token_id in config.json or generation_config.json",
            GPT2Warning,
            2,
        )
    return tokenizer


def end_token(config: GPT2Config, tokenizer: Tokenizer) -> int | None:
    """Return the token that ends a text for a model with its tokenizer: in training, scoring and instructions.

    It is the tokenizer's end token if the config names it too or names none. Otherwise it is the first of the config's that
    is a special token, because generation ends there; without one, it is the tokenizer's, because GPT-2's default id is an
    ordinary word in other vocabularies. None if both have none. A token beyond the model's rows counts as none.
    """
    own, ends = tokenizer.eot_token_id, config.eos_token_ids
    if own is None or own >= config.vocab_size:
        return next((token_id for token_id in ends if token_id in tokenizer.token_bytes), None)
    if own in ends:
        return own
    special = set(tokenizer.special_tokens.values())
    return next((token_id for token_id in ends if token_id in special), own)


def end_generation_at(model: GPT2, token_id: int | None) -> None:
    """Make generation with `model` end at `token_id` too, before it is trained to write it. None changes nothing."""
    ends = model.config.eos_token_ids
    if token_id is not None and token_id not in ends and token_id < model.config.vocab_size:
        model.config = replace(model.config, eos_token_id=(token_id, *ends))


def _named(token_id: int | None, tokenizer: Tokenizer) -> str:
    return "none" if token_id is None else f"{tokenizer.decode([token_id])!r:.80} ({token_id})"


def check_ids(ids: Sequence[int], tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise InputError, which names the token, if an id of a text is outside a model's vocabulary of `vocab_size` ids."""
    if tokenizer.vocab_size <= vocab_size:
        return
    wrong = next((token_id for token_id in ids if token_id >= vocab_size), None)
    if wrong is not None:
        raise InputError.of_token(wrong, vocab_size, token=tokenizer.decode([wrong]))
