"""The decode loop: `generate` continues prompts until each row has ended. It depends on `Batch`, and works on ids."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from gpt2.generation import sampling
from gpt2.generation.batch import Batch
from gpt2.generation.draft_model import check_vocabularies
from gpt2.generation.row import Row
from gpt2.model import GPT2
from gpt2.positions import check_mask
from gpt_config.errors import GPT2Warning, InputError, InputTypeError
from gpt_config.generation_config import GenerationConfig, GenerationOptions


def generate(
    model: GPT2,
    input_ids: Tensor,
    config: GenerationConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
    draft_model: GPT2 | None = None,
    **options: Unpack[GenerationOptions],
) -> Tensor:
    """Continue each row of `input_ids` (B, T), int64.

    Returns ids of shape (B * num_return_sequences, T + N), including the input, on its device and in its dtype. N is
    max_new_tokens, or less if all rows ended earlier; rows that ended earlier are filled with the first end-of-text id.

    - `options` are fields of GenerationConfig and override `config`.
    - `attention_mask` (B, T) is 1 for a token and 0 for padding, which may be on either side.
    - `use_cache=False` recomputes the whole sequence for each token: the same ids, slower.
    - `draft_model` is a smaller model with the same vocabulary that drafts tokens (see `speculation`): the same ids, faster.
      With `speculate=True` and no draft model, drafts come from the text itself.

    Raises InputError or InputTypeError for wrong arguments, and CheckpointError if the model computes NaN. For text, stop
    strings and streaming use `gpt2.complete`.

    >>> model.generate(input_ids, max_new_tokens=50, do_sample=True, temperature=0.7, top_k=40, seed=0)  # doctest: +SKIP
    """
    config = GenerationConfig.of(config, options, parameters=("attention_mask", "use_cache", "draft_model"))
    if draft_model is not None:
        check_vocabularies(model, draft_model)
        config = replace(config, speculate=True)
    if config.stop:
        raise InputError("stop strings need a tokenizer: use gpt2.complete(), which has one")
    rows = start(model, _prompts_of(input_ids, attention_mask), config)
    for _ in decode(Batch(model, use_cache=use_cache, draft_model=draft_model), rows):
        pass
    width = max((len(row.ids) for row in rows), default=0)
    filler = next(iter(model.config.eos_token_ids), 0)
    new_ids = [row.ids + [filler] * (width - len(row.ids)) for row in rows]
    new = torch.tensor(new_ids, dtype=input_ids.dtype, device=input_ids.device).view(len(rows), width)  # (B * n, N)
    inputs = input_ids.repeat_interleave(config.num_return_sequences, dim=0)  # (B * n, T)
    return torch.cat([inputs, new], dim=1)  # (B * n, T + N)


def start(model: GPT2, prompts: Sequence[Sequence[int]], config: GenerationConfig, *, logprobs: bool = False) -> list[Row]:
    """Return a new row for each continuation of each prompt, in the order of the prompts.

    An empty prompt is replaced by the model's bos_token_id. Of a prompt longer than the context, the model sees the end, and
    a GPT2Warning is issued. With `logprobs` the rows record log-probabilities. Raises InputError if an id is not in the
    model's vocabulary, if top_k is larger than the vocabulary, or if a prompt is empty and there is no bos_token_id.
    """
    limit, vocab_size = model.config.n_positions, model.config.vocab_size
    sampling.check_top_k(config.top_k, vocab_size)
    rows = []
    for prompt in prompts:
        ids = list(prompt)
        if not ids:
            if model.config.bos_token_id is None:
                raise InputError("the prompt is empty and this model has no bos_token_id to start from: give it a token")
            ids = [model.config.bos_token_id]
        wrong = [token for token in ids if not 0 <= token < vocab_size]
        if wrong:
            raise InputError.of_token(wrong[0], vocab_size)
        if len(ids) > limit:
            warnings.warn(
                f"a prompt has {len(ids)} tokens and the model sees {limit}: it continues the last {limit}", GPT2Warning, 3
            )
        rows += [Row(ids, config, limit, index, logprobs) for index in range(config.num_return_sequences)]
    return rows


def decode(batch: Batch, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Admit `rows` to the batch, and advance all its rows until each has a `finish_reason`.

    Yields lists of the rows that got a token. Between two lists, the caller may end a row by setting its `finish_reason`.
    Rows with beam search get all their tokens at once, one prompt after another.
    """
    batch.admit(rows)
    try:
        while batch.rows:
            yield from batch.step()
    except RuntimeError:
        batch.check_model()
        raise


def _prompts_of(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if not isinstance(input_ids, Tensor):
        raise InputTypeError(f"input_ids must be a tensor of shape (batch, tokens), not {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}: it must be (batch, tokens) of int64"
        )
    prompts: list[list[int]] = input_ids.tolist()
    if attention_mask is None:
        return prompts
    check_mask(attention_mask, tuple(input_ids.shape))
    check_mask(attention_mask.cpu(), tuple(input_ids.shape))  # the values too, on every device
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
