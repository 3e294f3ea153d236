"""The decode loop: from prompts to tokens, one at a time, in batches, until each row has ended. It knows ids, not text."""

from __future__ import annotations

import hashlib
import random
import secrets
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from gpt2.fast.costs import costs_of_verifying
from gpt2.generation import sampling
from gpt2.generation.beam_search import beam_search
from gpt2.generation.decoder import Decoder
from gpt2.generation.draft_model import DraftModel, check_vocabularies
from gpt2.generation.speculation import PromptLookup, Speculation
from gpt2.generation.window import Window
from gpt2.model import GPT2
from gpt_config.errors import GPT2Warning, InputError, InputTypeError
from gpt_config.generation_config import GenerationConfig

FinishReason = Literal["eot", "stop", "length"]


@dataclass
class Continuation:
    """One row of generation. The loop appends to `ids` and `logprobs`; whoever reads it may end it by `finish_reason`.

    `logprobs` are natural logarithms of the model's own probabilities, before temperature, penalties and cut-offs. An
    end-of-text token that ended the row is the last of `ids`.
    """

    prompt_ids: list[int]
    index: int  # which of the num_return_sequences of its prompt
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # "eot": end-of-text token; "stop": stop string; "length": max_new_tokens


def generate(
    model: GPT2,
    input_ids: Tensor,
    config: GenerationConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
    draft_model: GPT2 | None = None,
    **options: Any,
) -> Tensor:
    """Continue each row of `input_ids` (B, T) int64; returns (B * num_return_sequences, T + N), the input included.

    `options` are fields of GenerationConfig and win over `config`. N is max_new_tokens, or less if all rows ended before;
    rows that ended earlier are filled with the end-of-text id. `attention_mask` (B, T) is 0 at padding, on either side.
    `use_cache=False` computes everything anew for each token: the same ids, slowly. `draft_model` is a smaller model of the
    same vocabulary that guesses ahead, as `speculate` does without one: the same ids, sooner (`speculation`). For text,
    stop strings and streaming see `gpt2.generation.completion`.

    >>> model.generate(input_ids, max_new_tokens=50, do_sample=True, temperature=0.7, top_k=40, seed=0)  # doctest: +SKIP
    """
    if draft_model is not None:
        check_vocabularies(model, draft_model)
        options["speculate"] = True
    config = replace(config or GenerationConfig(), **options)
    if config.stop:
        raise InputError("stop strings need a tokenizer to look for them: use gpt2.complete(), which has one")
    prompts = _prompts_of(input_ids, attention_mask)
    rows = start(model, prompts, config)
    for _ in decode(model, rows, config, use_cache=use_cache, draft_model=draft_model):
        pass
    width = max((len(row.ids) for row in rows), default=0)
    filler = model.config.eos_token_id or 0
    new_ids = [row.ids + [filler] * (width - len(row.ids)) for row in rows]
    new = torch.tensor(new_ids, dtype=input_ids.dtype, device=input_ids.device).view(len(rows), width)
    return torch.cat([input_ids.repeat_interleave(config.num_return_sequences, dim=0), new], dim=1)


def start(model: GPT2, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[Continuation]:
    """A row for each continuation of each prompt, in order. An empty prompt starts from the model's bos_token_id.

    InputError if an id is not in the model's vocabulary, or top_k is larger than it. A prompt longer than the context
    keeps its end, and a warning says so.
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
            raise InputError(
                f"token id {wrong[0]} is outside the vocabulary of this model: ids go from 0 to {vocab_size - 1}; "
                "use the tokenizer that belongs to it"
            )
        if len(ids) > limit:
            warnings.warn(
                f"a prompt has {len(ids)} tokens and the model sees {limit}: it continues the last {limit}", GPT2Warning, 3
            )
        rows += [Continuation(ids, index) for index in range(config.num_return_sequences)]
    return rows


def decode(
    model: GPT2,
    rows: list[Continuation],
    config: GenerationConfig,
    *,
    vocab_size: int | None = None,
    use_cache: bool = True,
    logprobs: bool = False,
    draft_model: GPT2 | None = None,
) -> Iterator[list[Continuation]]:
    """Advance all rows, one token a step; yields those that got a token, until every row has a `finish_reason`.

    Between steps the reader may end a row by setting its `finish_reason`; the model must not be changed then, for the next
    tokens may have been computed already. Only ids below `vocab_size` are chosen: models are often padded to more rows than
    the tokenizer has ids. `logprobs` fills the rows' field of that name. Beam search yields once, at the end.
    CheckpointError if the model computes NaN.

    With `config.speculate`, or a `draft_model` of the same vocabulary, tokens are guessed ahead while a single row is left,
    of a batch too; several rows share the reading of the weights as it is, and go on without. Neither changes an id.
    """
    if config.max_new_tokens == 0:
        for row in rows:
            row.finish_reason = "length"
        yield rows
        return
    if config.num_beams > 1:
        _decode_beams(model, rows, config, vocab_size, use_cache, logprobs)
        yield rows
        return
    batch = list(rows)
    generators = _generators(batch, config)
    choose = partial(_choose, config=config, vocab_size=vocab_size)
    eot = model.config.eos_token_id if config.stop_at_eot else None
    only_largest = config.greedy and config.repetition_penalty == 1 and not logprobs
    decoder = Decoder(
        model,
        _windows(model, batch),
        config.max_new_tokens,
        use_cache=use_cache,
        only_largest=only_largest,
        vocab_size=vocab_size,
    )
    speculation = None
    if (config.speculate or draft_model is not None) and decoder.takes_drafts:
        drafter = DraftModel(draft_model, model, choose) if draft_model else PromptLookup(model.config.n_positions)
        speculation = Speculation(drafter, costs_of_verifying(model, each_alone=decoder.computes_each_alone))
    while batch:
        drafts: list[int] = []
        if speculation and len(batch) == 1:
            drafts = speculation.draft(decoder.windows[0].ids, decoder.room, generators[0])
        greedy_tokens = [] if drafts else decoder.greedy_tokens(eot)
        for token in greedy_tokens:
            yield _append([token], [], batch, decoder.windows, eot, config.max_new_tokens)
            if batch[0].finish_reason:
                return
        if greedy_tokens:
            if speculation:
                speculation.stepped(len(greedy_tokens) - 1)
            continue
        # The logits of B rows; or, with drafts, those of one row at one place after another, while drafts are the tokens.
        places = decoder.next_logits(drafts).split(len(batch))
        n_tokens = 0
        for logits, draft in zip(places, [*drafts, None], strict=False):
            tokens = choose(logits, [window.ids for window in decoder.windows], generators)
            row_logprobs = _logprobs(logits, tokens) if logprobs else []
            yield _append(tokens, row_logprobs, batch, decoder.windows, eot, config.max_new_tokens)
            n_tokens += 1
            if tokens != [draft] or batch[0].finish_reason:
                break
        if speculation and drafts:
            decoder.reject(len(places) - n_tokens)
            speculation.verified(len(drafts), n_tokens - 1)
        live = [place for place, row in enumerate(batch) if row.finish_reason is None]
        # To drop rows copies the cache of the others, so it waits until half of them have ended.
        if 2 * len(live) <= len(batch):
            batch = [batch[place] for place in live]
            generators = [generators[place] for place in live]
            if batch:
                decoder.select(live)


def _append(
    tokens: list[int],
    logprobs: list[float],
    batch: list[Continuation],
    windows: list[Window],
    eot: int | None,
    max_new_tokens: int,
) -> list[Continuation]:
    """Give each row its token and end those that it ends; the rows that were still open."""
    for window, token in zip(windows, tokens, strict=True):
        window.ids.append(token)  # an ended row goes along until the batch is made smaller
    advanced = [(place, row) for place, row in enumerate(batch) if row.finish_reason is None]
    for place, row in advanced:
        row.ids.append(tokens[place])
        row.logprobs += logprobs[place : place + 1]
        if tokens[place] == eot:
            row.finish_reason = "eot"
        elif len(row.ids) == max_new_tokens:
            row.finish_reason = "length"
    return [row for _, row in advanced]


def _decode_beams(
    model: GPT2,
    rows: list[Continuation],
    config: GenerationConfig,
    vocab_size: int | None,
    use_cache: bool,
    logprobs: bool,
) -> None:
    """Fill the rows of each prompt with the best beams of a search from it."""
    for first in range(0, len(rows), config.num_return_sequences):
        group = rows[first : first + config.num_return_sequences]
        beams = beam_search(model, group[0].prompt_ids, config, vocab_size=vocab_size, use_cache=use_cache)
        for row, beam in zip(group, beams, strict=True):
            row.ids, row.finish_reason = beam.ids, "eot" if beam.at_eot else "length"
            row.logprobs = beam.logprobs if logprobs else []


def _windows(model: GPT2, rows: list[Continuation]) -> list[Window]:
    return [Window(row.prompt_ids + row.ids, model.config.n_positions) for row in rows]


def _generators(rows: list[Continuation], config: GenerationConfig) -> list[random.Random]:
    """One generator a row, made from (seed, prompt, index) alone: not from the batch, nor from what ran before.

    Python's generator gives the same numbers on every platform and device. The prompt is part of it, so that different
    prompts under one seed do not share their luck.
    """
    seed = secrets.randbits(63) if config.seed is None else config.seed
    generators = []
    for row in rows:
        key = f"{seed},{row.index},{row.prompt_ids}".encode()
        generators.append(random.Random(hashlib.blake2b(key, digest_size=16).digest()))
    return generators


@torch.inference_mode()
def _choose(
    logits: Tensor,
    texts: list[list[int]],
    generators: list[random.Random],
    *,
    config: GenerationConfig,
    vocab_size: int | None,
) -> list[int]:
    """The next token of each text (B), from logits (B, V)."""
    if config.greedy and config.repetition_penalty == 1:
        return sampling.greedy(logits[:, :vocab_size]).tolist()
    # In float64 and on the CPU, for not every device has it: the same tokens wherever the model runs.
    logits = logits.cpu().double()
    logits = sampling.apply_repetition_penalty(logits, texts, config.repetition_penalty)[:, :vocab_size]
    if config.greedy:
        return sampling.greedy(logits).tolist()
    probs = sampling.logits_to_probs(logits, config)
    return sampling.sample(probs, [generator.random() for generator in generators]).tolist()


@torch.inference_mode()
def _logprobs(logits: Tensor, tokens: list[int]) -> list[float]:
    chosen = torch.tensor(tokens)[:, None]
    return logits.cpu().double().log_softmax(-1).gather(-1, chosen)[:, 0].tolist()


def _prompts_of(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if not isinstance(input_ids, Tensor):
        raise InputTypeError(f"input_ids must be a tensor of shape (batch, tokens), not {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}: it must be (batch, tokens) of int64"
        )
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)}: it must be {tuple(input_ids.shape)}")
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
