"""The decode loop: `generate` continues prompts until each row has ended. It depends on `Batch`, and works on ids."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from gpt2.fast.unchanged import is_called_as_written
from gpt2.generation.batch import Batch
from gpt2.generation.draft_model import check_vocabularies
from gpt2.generation.memory import check_memory
from gpt2.generation.processors import LogitsProcessor, as_processors
from gpt2.generation.row import Row
from gpt2.model import GPT2
from gpt2.positions import check_mask
from gpt_config.errors import GPT2Warning, InputError, InputTypeError
from gpt_config.generation_config import GenerationConfig, GenerationOptions


def generate(
    model: GPT2,
    input_ids: Tensor | None = None,
    config: GenerationConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
    draft_model: GPT2 | None = None,
    inputs_embeds: Tensor | None = None,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
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
    - `inputs_embeds` (B, T, C), in place of `input_ids`, has a vector for each token of the prompt; position embeddings are
      added to it. The result has the new ids only, (B * num_return_sequences, N), as in transformers; the controls, such as
      `repetition_penalty`, see these only.
    - `logits_processor` is a function (ids (1, T), logits (1, V)) -> logits (1, V), or several. They are called for each new
      token of each row, after the controls of the config. T counts the prompt, without padding; logits are float64 on the
      CPU. Objects of transformers work here. The result must depend on the arguments only: drafts take more calls.

    Raises InputError or InputTypeError for wrong arguments, and CheckpointError if the model computes NaN. For text, stop
    strings and streaming use `gpt2.complete`.

    >>> model.generate(input_ids, max_new_tokens=50, do_sample=True, temperature=0.7, top_k=40, seed=0)  # doctest: +SKIP
    """
    parameters = ("attention_mask", "use_cache", "draft_model", "inputs_embeds", "logits_processor")
    config = GenerationConfig.of(config, options, parameters=parameters)
    if draft_model is not None:
        check_vocabularies(model, draft_model)
        config = replace(config, speculate=True)
    if config.stop:
        raise InputError("stop strings need a tokenizer: use gpt2.complete(), which has one")
    if config.top_logprobs:
        raise InputError("top_logprobs are not ids: use gpt2.complete(), whose Completion has them")
    if input_ids is None and inputs_embeds is None:
        raise InputTypeError("input_ids must be a tensor, not None: give ids, or inputs_embeds")
    if input_ids is not None and inputs_embeds is not None:
        raise InputError("input_ids and inputs_embeds exclude each other: give one of them")
    processors = as_processors(logits_processor)
    if inputs_embeds is not None:
        if draft_model is not None:
            raise InputError("inputs_embeds are no tokens that a draft_model could read: leave one out")
        rows = start_embedded(model, inputs_embeds, attention_mask, config, processors=processors)
        before = torch.empty(len(inputs_embeds), 0, dtype=torch.int64, device=inputs_embeds.device)
    else:
        prompts = _prompts_of(input_ids, attention_mask)
        n_rows = len(prompts) * config.num_return_sequences
        check_memory(model, max(map(len, prompts), default=0), config, n_rows=n_rows, named="num_return_sequences")
        rows = start(model, prompts, config, processors=processors)
        assert input_ids is not None
        before = input_ids
    for _ in decode(Batch(model, use_cache=use_cache, draft_model=draft_model), rows):
        pass
    width = max((len(row.ids) for row in rows), default=0)
    filler = next(iter(config.eos_token_id or model.config.eos_token_ids), 0)
    new_ids = [row.ids + [filler] * (width - len(row.ids)) for row in rows]
    new = torch.tensor(new_ids, dtype=before.dtype, device=before.device).view(len(rows), width)  # (B * n, N)
    inputs = before.repeat_interleave(config.num_return_sequences, dim=0)  # (B * n, T)
    return torch.cat([inputs, new], dim=1)  # (B * n, T + N)


def start(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    logprobs: bool = False,
    processors: tuple[LogitsProcessor, ...] = (),
    ends_in_stop: Callable[[Sequence[int]], bool] | None = None,
) -> list[Row]:
    """Return a new row for each continuation of each prompt, in the order of the prompts.

    An empty prompt is replaced by the model's bos_token_id. Of a prompt longer than the context, the model sees the end, and
    a GPT2Warning is issued. With `logprobs` the rows record log-probabilities. `processors` and `ends_in_stop` are fields of
    `Row`. Raises InputError if an id of a prompt or of the config is not in the model's vocabulary, or if a prompt is empty
    and there is no bos_token_id; ConfigError if `bad_words` are text.
    """
    limit, vocab_size = model.config.n_positions, model.config.vocab_size
    _check_ids_of(config, vocab_size)
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
        rows += [
            Row(ids, config, limit, index, logprobs, processors=processors, ends_in_stop=ends_in_stop)
            for index in range(config.num_return_sequences)
        ]
    return rows


def start_embedded(
    model: GPT2,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    config: GenerationConfig,
    *,
    processors: tuple[LogitsProcessor, ...] = (),
) -> list[Row]:
    """Return rows as `start` does, for prompts that are embeddings (B, T, C). `attention_mask` (B, T) marks padding with 0.

    In the rows, a negative number stands for each vector, the same for equal vectors. Raises InputError for a wrong shape or
    dtype, a prompt without vectors, or a model whose `forward` was changed, which only takes ids.
    """
    if not isinstance(inputs_embeds, Tensor):
        raise InputTypeError(f"inputs_embeds must be a tensor (batch, tokens, n_embd), not {type(inputs_embeds).__name__}")
    shape, n_embd = tuple(inputs_embeds.shape), model.config.n_embd
    if len(shape) != 3 or shape[2] != n_embd or not inputs_embeds.is_floating_point():
        raise InputError(
            f"inputs_embeds has shape {shape} and dtype {inputs_embeds.dtype}: "
            f"it must be (batch, tokens, {n_embd}) of floating-point numbers"
        )
    if shape[1] > model.config.n_positions:
        raise InputError(f"inputs_embeds has {shape[1]} vectors and the model sees {model.config.n_positions}: give fewer")
    if not is_called_as_written(model):
        raise InputError("inputs_embeds cannot be used with hooks on the model or another forward: remove them, or give ids")
    _check_ids_of(config, model.config.vocab_size)
    rows = []
    for vectors, is_token in zip(inputs_embeds.detach(), _mask_of(attention_mask, shape[:2]), strict=True):
        by_placeholder = {_placeholder(vector): vector for vector in vectors[is_token]}
        ids = [_placeholder(vector) for vector in vectors[is_token]]
        if not ids:
            raise InputError("a prompt of inputs_embeds has no vectors: give it at least one")
        rows += [
            Row(ids, config, model.config.n_positions, index, processors=processors, vectors=by_placeholder)
            for index in range(config.num_return_sequences)
        ]
    return rows


def _placeholder(vector: Tensor) -> int:
    """A negative number of 63 bits that depends on the vector's values."""
    data = vector.double().cpu().numpy().tobytes()
    return -1 - int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) // 2


def _check_ids_of(config: GenerationConfig, vocab_size: int) -> None:
    named = [token for token, _ in config.logit_bias]
    named += [token for word in config.bad_word_ids for token in word]
    named += config.eos_token_id or ()
    if wrong := [token for token in named if token >= vocab_size]:
        raise InputError.of_token(wrong[0], vocab_size)


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


def _prompts_of(input_ids: Tensor | None, attention_mask: Tensor | None) -> list[list[int]]:
    if not isinstance(input_ids, Tensor):
        raise InputTypeError(f"input_ids must be a tensor of shape (batch, tokens), not {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}: it must be (batch, tokens) of int64"
        )
    prompts: list[list[int]] = input_ids.tolist()
    if attention_mask is None:
        return prompts
    masks = _mask_of(attention_mask, tuple(input_ids.shape))
    return [ids[mask].tolist() for ids, mask in zip(input_ids, masks.to(input_ids.device), strict=True)]


def _mask_of(attention_mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return the mask as bool on the CPU: all True if there is none."""
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool)
    check_mask(attention_mask, shape)
    check_mask(attention_mask.cpu(), shape)  # the values too, on every device
    return attention_mask.cpu().bool()
