"""Text completion: it combines the tokenizer, the decode loop and stop strings. The command line calls it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Unpack

from gpt2.generation.batch import Batch
from gpt2.generation.draft_model import check_vocabularies
from gpt2.generation.loop import decode, start
from gpt2.generation.memory import check_memory
from gpt2.generation.prefix_cache import PrefixCache
from gpt2.generation.processors import LogitsProcessor, as_processors
from gpt2.generation.prompts import Prompt, each_prompt, encode_prompt, text_of, with_bad_word_ids
from gpt2.generation.row import FinishReason, Row
from gpt2.generation.schedule import in_order
from gpt2.generation.slot_batch import batch_of
from gpt2.generation.steps import Step
from gpt2.generation.text_stream import TextStream, stop_test
from gpt2.model import GPT2
from gpt2.weights.tokenizer import check_ids
from gpt_config.generation_config import GenerationConfig, GenerationOptions
from gpt_config.validation import check_whole
from gpt_encoder.interface import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt.

    `text` ends before the stop string or the end-of-text token. `ids` and `logprobs` contain every generated token, also
    those of the stop string or the end-of-text token. `logprobs` are natural logarithms of the model's probabilities before
    temperature and truncation. `top_logprobs` has the most probable ids of each step with these logarithms, as many as the
    option `top_logprobs`, the largest first. Of a prompt that was given as ids, `prompt` is the text. Times are in seconds
    from the start of the prompt.
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
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)


def complete(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Prompt | Iterable[Prompt],
    config: GenerationConfig | None = None,
    *,
    draft_model: GPT2 | None = None,
    allowed_special: Literal["all"] | Collection[str] = (),
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    on_step: Callable[[Step], object] = lambda step: None,
    **options: Unpack[GenerationOptions],
) -> list[Completion]:
    """Continue one prompt or several as one batch. A prompt is a text or a list of token ids.

    Returns `num_return_sequences` completions of each prompt, in the order of the prompts. `options` are fields of
    GenerationConfig and override `config`. `draft_model` and `logits_processor` are as for `generate`, with logits of the
    tokenizer's ids only. Texts in `bad_words` are encoded alone and after a space. `allowed_special` names the special
    tokens to be read in the prompts, as in `Tokenizer.encode`; all others are ordinary text. `on_step` is called with each
    step of the batch (`generation.steps`). Raises InputError or InputTypeError for wrong arguments.

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
        logits_processor=logits_processor,
        on_step=on_step,
        **options,
    )
    for row, _, completion in events:
        if completion is not None:
            completions[row] = completion
    return [completions[row] for row in sorted(completions)]


class Request(NamedTuple):
    """A prompt, and how it is continued."""

    prompt: str | list[int]
    config: GenerationConfig


def complete_in_batches(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Prompt | Iterable[Prompt],
    config: GenerationConfig | None = None,
    *,
    batch_size: int,
    logprobs: bool = True,
    draft_model: GPT2 | None = None,
    allowed_special: Literal["all"] | Collection[str] = (),
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    on_step: Callable[[Step], object] = lambda step: None,
    **options: Unpack[GenerationOptions],
) -> Iterator[list[Completion]]:
    """Continue many prompts, at most `batch_size` rows at a time. Each row that ends makes place for the next one.

    Yields a list of `num_return_sequences` completions for each prompt, in the order of the prompts, which may come from a
    generator: it is read as rows end. The other arguments are those of `complete`. With `logprobs=False` the
    log-probabilities are not computed. A beginning that several prompts share is computed once (`PrefixCache`). Wrong
    arguments raise in the call itself, and a wrong prompt when it is read.

    >>> for completions in complete_in_batches(model, tokenizer, prompts, batch_size=32):  # doctest: +SKIP
    ...     print(completions[0].text)
    """
    parameters = ("batch_size", "logprobs", "draft_model", "allowed_special", "logits_processor")
    config = _with_seed(GenerationConfig.of(config, options, parameters=parameters))
    return complete_requests(
        model,
        tokenizer,
        (Request(prompt, config) for prompt in each_prompt(prompts)),
        batch_size=batch_size,
        logprobs=logprobs,
        draft_model=draft_model,
        allowed_special=allowed_special,
        logits_processor=logits_processor,
        on_step=on_step,
    )


def complete_requests(
    model: GPT2,
    tokenizer: Tokenizer,
    requests: Iterable[Request],
    *,
    batch_size: int,
    logprobs: bool = True,
    draft_model: GPT2 | None = None,
    allowed_special: Literal["all"] | Collection[str] = (),
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    on_step: Callable[[Step], object] = lambda step: None,
) -> Iterator[list[Completion]]:
    """Continue prompts that each have a config of their own, otherwise as `complete_in_batches`."""
    check_whole("batch_size", batch_size, 1)
    if draft_model is not None:
        check_vocabularies(model, draft_model, tokenizer)
    processors = as_processors(logits_processor)
    text_rows: dict[int, _TextRow] = {}  # of rows that have not been given, by the row's id
    configs: dict[int, tuple[GenerationConfig, GenerationConfig]] = {}  # one object each: its rows are sampled together

    def started(request: Request) -> list[Row]:
        ids = encode_prompt(tokenizer, request.prompt, allowed_special)
        check_ids(ids, tokenizer, model.config.vocab_size)
        check_memory(model, len(ids), request.config, n_rows=1)
        if id(request.config) not in configs:
            configs[id(request.config)] = request.config, with_bad_word_ids(_with_seed(request.config), tokenizer)
        config = configs[id(request.config)][1]
        ends_in_stop = stop_test(tokenizer, config.stop)
        rows = start(model, [ids], config, logprobs=logprobs, processors=processors, ends_in_stop=ends_in_stop)
        prompt = text_of(tokenizer, request.prompt)
        text_rows.update((id(row), _TextRow(row, prompt, tokenizer)) for row in rows)
        return rows

    def completed() -> Iterator[list[Completion]]:
        batch = batch_of(model, batch_size, vocab_size=tokenizer.vocab_size, draft_model=draft_model, on_step=on_step)
        try:
            ended = in_order(
                batch, map(started, requests), batch_size=batch_size, read=lambda row: text_rows[id(row)].read()
            )
            for rows in ended:
                yield [text_rows.pop(id(row)).completion() for row in rows]
        except RuntimeError:
            batch.check_model()
            raise

    return completed()


def stream(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: Prompt,
    config: GenerationConfig | None = None,
    *,
    draft_model: GPT2 | None = None,
    allowed_special: Literal["all"] | Collection[str] = (),
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
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
        model,
        tokenizer,
        [prompt],
        config,
        draft_model=draft_model,
        allowed_special=allowed_special,
        logits_processor=logits_processor,
        **options,
    )
    for _, piece, _ in events:
        if piece:
            yield piece


def stream_batch(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Prompt | Iterable[Prompt],
    config: GenerationConfig | None = None,
    *,
    logprobs: bool = False,
    draft_model: GPT2 | None = None,
    allowed_special: Literal["all"] | Collection[str] = (),
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    prefix_cache: PrefixCache | None = None,
    on_step: Callable[[Step], object] = lambda step: None,
    **options: Unpack[GenerationOptions],
) -> Iterator[tuple[int, str, Completion | None]]:
    """Continue prompts as one batch; `complete`, `complete_in_batches` and `stream` call this.

    Yields (row, new text, completion) whenever a row advances. The completion is None until the row has ended; the new text
    may be "". Row r is continuation r % num_return_sequences of prompt r // num_return_sequences. `on_step` is called with
    each step of the batch (`generation.steps`). `prefix_cache` is as for `Batch`. Wrong arguments raise in
    the call itself, before the first iteration.
    """
    parameters = ("draft_model", "allowed_special", "logits_processor")
    config = _with_seed(GenerationConfig.of(config, options, parameters=parameters))
    config = with_bad_word_ids(config, tokenizer)
    if draft_model is not None:
        check_vocabularies(model, draft_model, tokenizer)
        config = replace(config, speculate=True)
    given = list(each_prompt(prompts))
    encoded = [encode_prompt(tokenizer, prompt, allowed_special) for prompt in given]
    for ids in encoded:
        check_ids(ids, tokenizer, model.config.vocab_size)
    n_rows = len(encoded) * config.num_return_sequences
    check_memory(model, max(map(len, encoded), default=0), config, n_rows=n_rows, named="num_return_sequences")
    processors, ends_in_stop = as_processors(logits_processor), stop_test(tokenizer, config.stop)
    rows = start(model, encoded, config, logprobs=logprobs, processors=processors, ends_in_stop=ends_in_stop)
    batch = Batch(
        model, vocab_size=tokenizer.vocab_size, draft_model=draft_model, prefix_cache=prefix_cache, on_step=on_step
    )
    prompt_of_row = [text_of(tokenizer, prompt) for prompt in given for _ in range(config.num_return_sequences)]
    return _events(decode(batch, rows), [_TextRow(*pair, tokenizer) for pair in zip(rows, prompt_of_row, strict=True)])


def _with_seed(config: GenerationConfig) -> GenerationConfig:
    """Return `config` with a seed. If it has none, one is drawn here, so that the Completion can report it."""
    return config if config.seed is not None else replace(config, seed=secrets.randbits(31))


class _TextRow:
    """A row with its prompt, its text so far and its times."""

    def __init__(self, row: Row, prompt: str, tokenizer: Tokenizer) -> None:
        self.row, self.prompt = row, prompt
        self.stream = TextStream(tokenizer, row.config.stop)
        self._to_first_token: float | None = None
        self._seconds = 0.0

    def read(self) -> str:
        """Return the text of the row's new tokens."""
        self._seconds = time.perf_counter() - (self.row.began or 0.0)  # `Batch` has set it on the same clock
        if self._to_first_token is None:
            self._to_first_token = self._seconds
        return self.stream.read(self.row)

    def completion(self) -> Completion:
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
            seconds_to_first_token=self._to_first_token or 0.0,
            seconds=self._seconds,
            top_logprobs=row.top_logprobs,
        )


def _events(advances: Iterator[list[Row]], text_rows: list[_TextRow]) -> Iterator[tuple[int, str, Completion | None]]:
    place_of = {id(text_row.row): place for place, text_row in enumerate(text_rows)}
    for advanced in advances:
        for row in advanced:
            place = place_of[id(row)]
            piece = text_rows[place].read()
            yield place, piece, text_rows[place].completion() if row.finish_reason else None
