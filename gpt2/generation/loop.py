"""The decode loop: `generate`, from prompts to tokens until each row has ended. It knows ids, not text."""

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
    """Continue each row of `input_ids` (B, T) int64; returns (B * num_return_sequences, T + N), the input included.

    `options` are fields of GenerationConfig and win over `config`. N is max_new_tokens, or less if all rows ended before;
    rows that ended earlier are filled with the end-of-text id. `attention_mask` (B, T) is 0 at padding, on either side.
    `use_cache=False` computes everything from the start for each token: the same ids, slowly. `draft_model` is a smaller
    model of the same vocabulary that drafts tokens, as `speculate` does without one: the same ids, faster (`speculation`).
    For text, stop strings and streaming see `gpt2.complete`.

    >>> model.generate(input_ids, max_new_tokens=50, do_sample=True, temperature=0.7, top_k=40, seed=0)  # doctest: +SKIP
    """
    config = GenerationConfig.of(config, options, parameters=("attention_mask", "use_cache", "draft_model"))
    if draft_model is not None:
        check_vocabularies(model, draft_model)
        config = replace(config, speculate=True)
    if config.stop:
        raise InputError("stop strings need a tokenizer to look for them: use gpt2.complete(), which has one")
    rows = start(model, _prompts_of(input_ids, attention_mask), config)
    for _ in decode(Batch(model, use_cache=use_cache, draft_model=draft_model), rows):
        pass
    width = max((len(row.ids) for row in rows), default=0)
    filler = model.config.eos_token_id or 0
    new_ids = [row.ids + [filler] * (width - len(row.ids)) for row in rows]
    new = torch.tensor(new_ids, dtype=input_ids.dtype, device=input_ids.device).view(len(rows), width)  # (B * n, N)
    inputs = input_ids.repeat_interleave(config.num_return_sequences, dim=0)  # (B * n, T)
    return torch.cat([inputs, new], dim=1)  # (B * n, T + N)


def start(model: GPT2, prompts: Sequence[Sequence[int]], config: GenerationConfig, *, logprobs: bool = False) -> list[Row]:
    """A row for each continuation of each prompt, in order. An empty prompt starts from the model's bos_token_id.

    With `logprobs` the rows' field of that name is filled. InputError if an id is not in the model's vocabulary, or top_k is
    larger than it. A prompt longer than the context keeps its end, and a warning says so.
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
    """Advance all rows of a batch, these included, until every one has a `finish_reason`; yields those that got a token.

    Between two tokens the reader may end a row by setting its `finish_reason`. Beams come as whole texts, prompt by prompt.
    """
    batch.admit(rows)
    while batch.rows:
        yield from batch.step()


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
    if attention_mask.shape != input_ids.shape:
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)}: it must be {tuple(input_ids.shape)}")
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
