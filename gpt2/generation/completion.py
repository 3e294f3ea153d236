"""Completions of text: tokenizer, decode loop and stop strings put together. This is what the command line calls."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpt2.generation.draft_model import check_vocabularies
from gpt2.generation.loop import Continuation, FinishReason, decode, start
from gpt2.generation.text_stream import TextStream
from gpt2.model import GPT2
from gpt_config.errors import InputTypeError
from gpt_config.generation_config import GenerationConfig
from gpt_encoder.interface import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt.

    `text` ends before the stop string or end-of-text token that ended it; `ids` and `logprobs` (natural logarithms, the
    model's own, before temperature and cut-offs) hold every token that was generated, that one too. Times are in seconds
    from the start of the batch.
    """

    prompt: str
    text: str
    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    index: int
    seed: int
    seconds_to_first_token: float
    seconds: float


def complete(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    config: GenerationConfig | None = None,
    **options: Any,
) -> list[Completion]:
    """Continue one prompt or a batch of them: `num_return_sequences` completions of each, in the order of the prompts.

    `options` are fields of GenerationConfig and win over `config`, or `draft_model`, as for `generate`.

    >>> complete(model, tokenizer, "Once upon a time", max_new_tokens=20)[0].text  # doctest: +SKIP
    """
    completions: dict[int, Completion] = {}
    for row, _, completion in stream_batch(model, tokenizer, prompts, config, logprobs=True, **options):
        if completion is not None:
            completions[row] = completion
    return [completions[row] for row in sorted(completions)]


# Prompts of like length share a batch, so that little of it is padding. They are sorted among so many batches at a time, for
# the first texts should not have to wait for the last.
_SORTED_BATCHES = 16


def complete_in_batches(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: GenerationConfig | None = None,
    *,
    batch_size: int,
    logprobs: bool = True,
    draft_model: GPT2 | None = None,
    **options: Any,
) -> Iterator[list[Completion]]:
    """The completions of each of many prompts, in their order; `batch_size` prompts are run at once.

    `options` are fields of GenerationConfig and win over `config`. Without `logprobs` those are not computed.

    >>> for completions in complete_in_batches(model, tokenizer, prompts, batch_size=32):  # doctest: +SKIP
    ...     print(completions[0].text)
    """
    config = _with_seed(replace(config or GenerationConfig(), **options))
    for first in range(0, len(prompts), _SORTED_BATCHES * batch_size):
        group = prompts[first : first + _SORTED_BATCHES * batch_size]
        lengths = [len(tokenizer.encode(prompt)) for prompt in group]
        by_length = sorted(range(len(group)), key=lambda place: -lengths[place])  # the longest first: it needs the memory
        done: dict[int, list[Completion]] = {}
        n_given = 0
        for start_of_batch in range(0, len(group), batch_size):
            places = by_length[start_of_batch : start_of_batch + batch_size]
            texts = [group[place] for place in places]
            for row, _, completion in stream_batch(
                model, tokenizer, texts, config, logprobs=logprobs, draft_model=draft_model
            ):
                if completion is not None:
                    done.setdefault(places[row // config.num_return_sequences], []).append(completion)
            while n_given in done:
                yield sorted(done.pop(n_given), key=lambda completion: completion.index)
                n_given += 1


def stream(
    model: GPT2, tokenizer: Tokenizer, prompt: str, config: GenerationConfig | None = None, **options: Any
) -> Iterator[str]:
    """The text that continues `prompt`, piece by piece as it is made; whole characters only.

    Text that may be the beginning of a stop string is held back until it is clear that it is not.

    >>> for piece in stream(model, tokenizer, "Once upon a time"):  # doctest: +SKIP
    ...     print(piece, end="", flush=True)
    """
    options["num_return_sequences"] = 1
    for _, piece, _ in stream_batch(model, tokenizer, [prompt], config, **options):
        if piece:
            yield piece


def stream_batch(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    config: GenerationConfig | None = None,
    *,
    logprobs: bool = False,
    draft_model: GPT2 | None = None,
    **options: Any,
) -> Iterator[tuple[int, str, Completion | None]]:
    """What both are made of: (row, new text, and the Completion once the row has ended), for all rows as they advance.

    Row r is continuation r % num_return_sequences of prompt r // num_return_sequences. `new text` may be "". What is wrong
    with the arguments is raised by the call itself, before anything is generated.
    """
    if draft_model is not None:
        check_vocabularies(model, draft_model, tokenizer)
        options["speculate"] = True
    config = _with_seed(replace(config or GenerationConfig(), **options))
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, (list, tuple)):
        raise InputTypeError(f"prompts must be a str or a list of them, not {type(texts).__name__}")
    rows = start(model, [tokenizer.encode(text) for text in texts], config)
    return _advance(model, tokenizer, texts, rows, config, logprobs, draft_model)


def _with_seed(config: GenerationConfig) -> GenerationConfig:
    """`config` with a seed: drawn here where it has none, so that the Completion can tell it."""
    return config if config.seed is not None else replace(config, seed=secrets.randbits(31))


def _advance(
    model: GPT2,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    rows: list[Continuation],
    config: GenerationConfig,
    logprobs: bool,
    draft_model: GPT2 | None,
) -> Iterator[tuple[int, str, Completion | None]]:
    streams = [TextStream(tokenizer, config.stop) for _ in rows]
    place_of = {id(row): place for place, row in enumerate(rows)}
    began = time.perf_counter()
    first_token_at: float | None = None

    def ended(place: int) -> Completion:
        row, now = rows[place], time.perf_counter() - began
        return Completion(
            prompt=texts[place // config.num_return_sequences],
            text=streams[place].text,
            prompt_ids=row.prompt_ids,
            ids=row.ids,
            logprobs=row.logprobs,
            finish_reason=row.finish_reason or "length",
            index=row.index,
            seed=config.seed or 0,
            seconds_to_first_token=now if first_token_at is None else first_token_at,
            seconds=now,
        )

    for advanced in decode(model, rows, config, vocab_size=tokenizer.vocab_size, logprobs=logprobs, draft_model=draft_model):
        first_token_at = time.perf_counter() - began if first_token_at is None else first_token_at
        for row in advanced:
            place = place_of[id(row)]
            piece = streams[place].read(row)
            yield place, piece, ended(place) if row.finish_reason else None
