"""Give the token embedding of a model more or fewer rows, as for new special tokens. It depends on models and tokenizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from gpt2.model import GPT2
from gpt2.quantization.quantize import is_int8
from gpt_config.errors import InputError
from gpt_config.new_tokens import NEW_ROWS
from gpt_config.validation import check_choice, check_whole, plain_number
from gpt_encoder.interface import Tokenizer


def resize(model: GPT2, rows: Tokenizer | int, *, new_rows: str = "mean", seed: int = 0) -> None:
    """Give the token embedding of `model`, which is also its head, as many rows as `rows` says, in place.

    A tokenizer stands for a row for each of its ids; rows beyond them stay. With a number, rows beyond it are cut off. New
    rows are the mean of the old ones, which keeps the new tokens from being much more probable than all others (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models"). With `new_rows` "random" they are normal numbers of
    the model's initializer_range, drawn from `seed`.

    ConfigError for a wrong number or name. InputError if the model is in int8, or if the row of its end token would be cut.
    """
    n_old = model.config.vocab_size
    n_rows = plain_number(max(n_old, rows.vocab_size) if isinstance(rows, Tokenizer) else rows)
    check_whole("rows", n_rows, 1)
    _set_rows(model, n_rows, range(n_old, n_rows), n_old, new_rows, seed)


def add_special_tokens(
    model: GPT2, tokenizer: Tokenizer, tokens: Sequence[str], *, new_rows: str = "mean", seed: int = 0
) -> Tokenizer:
    """Return `tokenizer` with the special tokens `tokens`, and give `model` rows for their ids, in place.

    Tokens that are already special stay as they are. If the embedding has rows for the new ids, as those that only fill it
    up to a multiple of 64, these rows begin again. Errors are those of `resize` and of `with_special_tokens`.
    """
    new = tokenizer.with_special_tokens(tokens)
    first, n_old = min(tokenizer.vocab_size, model.config.vocab_size), model.config.vocab_size
    if new.vocab_size > tokenizer.vocab_size:
        _set_rows(model, max(n_old, new.vocab_size), range(first, new.vocab_size), first, new_rows, seed)
    return new


@torch.no_grad()
def _set_rows(model: GPT2, n_rows: int, begin_again: range, n_known: int, new_rows: str, seed: int) -> None:
    """Give `model` `n_rows` rows; those of `begin_again` are new. The first `n_known` rows are those of known tokens."""
    check_choice("new_rows", new_rows, NEW_ROWS)
    if is_int8(model):
        raise InputError("the model is in int8, whose embedding cannot be resized: load it with dtype=float32")
    ends = [token_id for token_id in model.config.eos_token_ids if n_rows <= token_id < model.config.vocab_size]
    if ends:
        raise InputError(f"{n_rows} rows would cut off the end token {ends[0]}: keep at least {max(ends) + 1} rows")
    old = model.wte.weight
    weight = old.new_empty(n_rows, old.shape[1])
    weight[: len(old)] = old[:n_rows]
    if new_rows == "mean":
        weight[begin_again.start : begin_again.stop] = old[:n_known].double().mean(0).to(old.dtype)
    else:
        numbers = torch.Generator().manual_seed(seed)
        drawn = torch.randn(len(begin_again), old.shape[1], generator=numbers) * model.config.initializer_range
        weight[begin_again.start : begin_again.stop] = drawn.to(weight)
    model.wte.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    model.wte.num_embeddings = n_rows
    model.config = dataclasses.replace(model.config, vocab_size=n_rows)
