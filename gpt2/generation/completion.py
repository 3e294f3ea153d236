"""Text completion: it combines the tokenizer, the decode loop and stop strings. The command line calls it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Unpack

from gpt2.generation.batch import Batch
from gpt2.generation.draft_model import check_vocabularies
from gpt2.generation.loop import decode, start
from gpt2.generation.row import FinishReason, Row
from gpt2.generation.steps import Step
from gpt2.generation.text_stream import TextStream
from gpt2.model import GPT2
from gpt2.weights.tokenizer import check_ids
from gpt_config.errors import InputTypeError
from gpt_config.generation_config import GenerationConfig, GenerationOptions
from gpt_config.validation import check_whole
from gpt_encoder.interface import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt.

    `text` ends before the stop string or the end-of-text token. `ids` and `logprobs` contain every generated token, also
    those of the stop string or the end-of-text token. `logprobs` are natural logarithms of the model's probabilities before
    temperature and truncation. Times are in seconds from the start of the batch.
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
    *,
    draft_model: GPT2 | None = None,
    allowed_special: Literal["all"] | Collection[str] = (),
    on_step: Callable[[Step], object] = lambda step: None,
    **options: Unpack[GenerationOptions],
) -> list[Completion]:
    """Continue one prompt or several as one batch.

    Returns `num_return_sequences` completions of each prompt, in the order of the prompts. `options` are fields of
    GenerationConfig and override `config`. `draft_model` is as for `generate`. `allowed_special` names the special tokens to
    be read in the prompts, as in `Tokenizer.encode`; all others are ordinary text. `on_step` is called with each step of the
    batch (`generation.steps`). Raises InputError or InputTypeError for wrong arguments.

    >>> complete(model, tokenizer, "Once upon a time", max_new_tokens=20)[0].text  # doctest: +SKIP
    """
    completions: dict[int, Completion] = {}
    events = stream_batch(
        model,
        tokenizer,
        prompts,
        config,
        logprobs=True,
        draft_model=draft_model,
        allowed_special=allowed_special,
        on_step=on_step,
        **options,
    )
    for row, _, completion in events:
        if completion is not None:
            completions[row] = completion
    return [completions[row] for row in sorted(completions)]


# Number of batches whose prompts are sorted by length together. Batches of similar lengths need little padding; sorting all
# prompts would delay the first texts.
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
    allowed_special: Literal["all"] | Collection[str] = (),
    on_step: Callable[[Step], object] = lambda step: None,
    **options: Unpack[GenerationOptions],
) -> Iterator[list[Completion]]:
    """Continue many prompts, `batch_size` of them at a time.

    Yields a list of `num_return_sequences` completions for each prompt, in the order of the prompts. `options` are fields of
    GenerationConfig and override `config`. With `logprobs=False` the log-probabilities are not computed.

    >>> for completions in complete_in_batches(model, tokenizer, prompts, batch_size=32):  # doctest: +SKIP
    ...     print(completions[0].text)
    """
    check_whole("batch_size", batch_size, 1)
    if not isinstance(prompts, (list, tuple)):
        raise InputTypeError(f"prompts must be a list of str, not {type(prompts).__name__}")
    parameters = ("batch_size", "logprobs", "draft_model", "allowed_special")
    config = _with_seed(GenerationConfig.of(config, options, parameters=parameters))
    for first in range(0, len(prompts), _SORTED_BATCHES * batch_size):
        group = prompts[first : first + _SORTED_BATCHES * batch_size]
        lengths = [len(tokenizer.encode(prompt, allowed_special=allowed_special)) for prompt in group]
        # The longest come first, because they need the most memory.
        by_length = sorted(range(len(group)), key=lambda place: -lengths[place])
        done: dict[int, list[Completion]] = {}
        n_given = 0
        for start_of_batch in range(0, len(group), batch_size):
            places = by_length[start_of_batch : start_of_batch + batch_size]
            texts = [group[place] for place in places]
            events = stream_batch(
                model,
                tokenizer,
                texts,
                config,
                logprobs=logprobs,
                draft_model=draft_model,
                allowed_special=allowed_special,
                on_step=on_step,
            )
            for row, _, completion in events:
                if completion is not None:
                    done.setdefault(places[row // config.num_return_sequences], []).append(completion)
            while n_given in done:
                yield sorted(done.pop(n_given), key=lambda completion: completion.index)
                n_given += 1


def stream(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    config: GenerationConfig | None = None,
    *,
    draft_model: GPT2 | None = None,
    allowed_special: Literal["all"] | Collection[str] = (),
    **options: Unpack[GenerationOptions],
) -> Iterator[str]:
    """Continue `prompt`, and yield the new text in pieces as it is generated; each piece contains whole characters only.

    Text that may be the beginning of a stop string is held back until later tokens decide. The arguments are those of
    `complete`, for one prompt and one continuation.

    >>> for piece in stream(model, tokenizer, "Once upon a time"):  # doctest: +SKIP
    ...     print(piece, end="", flush=True)
    """
    options["num_return_sequences"] = 1
    events = stream_batch(
        model, tokenizer, [prompt], config, draft_model=draft_model, allowed_special=allowed_special, **options
    )
    for _, piece, _ in events:
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
    allowed_special: Literal["all"] | Collection[str] = (),
    on_step: Callable[[Step], object] = lambda step: None,
    **options: Unpack[GenerationOptions],
) -> Iterator[tuple[int, str, Completion | None]]:
    """Continue prompts as one batch; `complete`, `complete_in_batches` and `stream` call this.

    Yields (row, new text, completion) whenever a row advances. The completion is None until the row has ended; the new text
    may be "". Row r is continuation r % num_return_sequences of prompt r // num_return_sequences. `on_step` is called with
    each step of the batch (`generation.steps`). Wrong arguments raise in the call itself, before the first iteration.
    """
    config = _with_seed(GenerationConfig.of(config, options, parameters=("draft_model", "allowed_special")))
    if draft_model is not None:
        check_vocabularies(model, draft_model, tokenizer)
        config = replace(config, speculate=True)
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, (list, tuple)):
        raise InputTypeError(f"prompts must be a str or a list of them, not {type(texts).__name__}")
    encoded = [tokenizer.encode(text, allowed_special=allowed_special) for text in texts]
    for ids in encoded:
        check_ids(ids, tokenizer, model.config.vocab_size)
    rows = start(model, encoded, config, logprobs=logprobs)
    batch = Batch(model, vocab_size=tokenizer.vocab_size, draft_model=draft_model, on_step=on_step)
    prompt_of_row = [text for text in texts for _ in range(config.num_return_sequences)]
    return _events(decode(batch, rows), [_TextRow(*pair, tokenizer) for pair in zip(rows, prompt_of_row, strict=True)])


def _with_seed(config: GenerationConfig) -> GenerationConfig:
    """Return `config` with a seed. If it has none, one is drawn here, so that the Completion can report it."""
    return config if config.seed is not None else replace(config, seed=secrets.randbits(31))


class _TextRow:
    """A row with its prompt and its text so far."""

    def __init__(self, row: Row, prompt: str, tokenizer: Tokenizer) -> None:
        self.row, self.prompt = row, prompt
        self.stream = TextStream(tokenizer, row.config.stop)

    def completion(self, seconds_to_first_token: float, seconds: float) -> Completion:
        row = self.row
        return Completion(
            prompt=self.prompt,
            text=self.stream.text,
            prompt_ids=row.prompt_ids,
            ids=row.ids,
            logprobs=row.logprobs,
            finish_reason=row.finish_reason or "length",
            index=row.index,
            seed=row.config.seed or 0,
            seconds_to_first_token=seconds_to_first_token,
            seconds=seconds,
        )


def _events(advances: Iterator[list[Row]], text_rows: list[_TextRow]) -> Iterator[tuple[int, str, Completion | None]]:
    place_of = {id(text_row.row): place for place, text_row in enumerate(text_rows)}
    began, to_first_token = time.perf_counter(), None
    for advanced in advances:
        if to_first_token is None:
            to_first_token = time.perf_counter() - began
        for row in advanced:
            place = place_of[id(row)]
            piece, completion = text_rows[place].stream.read(row), None
            if row.finish_reason:
                completion = text_rows[place].completion(to_first_token, time.perf_counter() - began)
            yield place, piece, completion
