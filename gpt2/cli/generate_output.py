"""The output of `gpt2 generate`: continuations as text or JSON lines. It calls `gpt2.generation`; it reads no prompts."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from gpt2.cli.json_lines import json_line
from gpt2.cli.output_file import OutputFile
from gpt2.cli.prompts import Prompt
from gpt_config.errors import GPT2Warning
from gpt_config.generation_config import GenerationConfig

if TYPE_CHECKING:
    from gpt2.generation.completion import Completion
    from gpt2.generation.steps import StepCounts
    from gpt2.pretrained import GPT2
    from gpt_encoder.interface import Tokenizer

# With `--out`, prompts are completed in parts of this many rows per place of the batch. Rounding depends on which rows run
# together, and can change a sampled token. A resumed run begins with such a part, so its rows run together as before.
_PART = 16


class Loaded(NamedTuple):
    """The model with its tokenizer and the name that it was loaded by, and the draft model if one was given."""

    model: GPT2
    tokenizer: Tokenizer
    name: str
    draft_model: GPT2 | None
    steps: StepCounts  # counts the steps of generation


class Task(NamedTuple):
    """A prompt with the config that it is continued with."""

    prompt: Prompt
    config: GenerationConfig


class Layout(NamedTuple):
    """How continuations are computed and printed."""

    as_json: bool
    echo: bool  # print the prompt before its continuation
    stream: bool  # print text as it is generated
    special_tokens: bool  # read special tokens in the prompts
    batch_size: int

    @property
    def allowed_special(self) -> Any:
        """As `Tokenizer.encode` takes it."""
        return "all" if self.special_tokens else ()


def write_results(loaded: Loaded, tasks: Sequence[Task], layout: Layout, out: OutputFile | None) -> None:
    """Print the continuations in order, or append them to `out` after those that it has."""
    n_rows = sum(task.config.num_return_sequences for task in tasks)
    fits = n_rows <= layout.batch_size
    if out is None and fits and not layout.as_json and all(task.config is tasks[0].config for task in tasks):
        _stream_text(loaded, [task.prompt.text for task in tasks], tasks[0].config, layout)
        return
    with _Bar(len(tasks), 0 if out is None else out.n_done, is_shown=out is not None or not fits) as bar:
        for place, completions in _in_order(loaded, tasks, layout, out):
            fields = [
                _as_dict(completion, loaded.name, tasks[place], with_timings=out is None) for completion in completions
            ]
            texts = [completion.prompt * layout.echo + completion.text for completion in completions]
            records = [json_line(item) for item in fields] if layout.as_json else texts
            if out is not None:
                _append(out, place, "".join(f"{record}\n" for record in records))
            else:
                bar.clear()
                for completion, record in zip(completions, records, strict=True):
                    if not layout.as_json:
                        click.echo(_heading(place, len(tasks), completion.index), err=True)
                    click.echo(record)
            bar.update(completions, is_new=out is None or out.n_done == place + 1)


def _append(out: OutputFile, place: int, result: str) -> None:
    """Append a result. Compare it with the one that the file has, if the part that goes on began before it."""
    content = result.encode("utf-8", errors="replace")
    if place >= out.n_done:
        out.append(content)
    elif content != out.result_of(place):
        warnings.warn(
            f"prompt {place + 1} was continued differently in the earlier run, whose text stays: rounding differs on "
            "another machine, and with --speculate from run to run",
            GPT2Warning,
            2,
        )


def _in_order(
    loaded: Loaded, tasks: Sequence[Task], layout: Layout, out: OutputFile | None
) -> Iterator[tuple[int, list[Completion]]]:
    """(place, completions) of each task in order, from the beginning of the part in which the results of `out` end."""
    from gpt2.generation.completion import Request, complete_requests

    for part in [range(len(tasks))] if out is None else _parts(tasks, _PART * layout.batch_size):
        if out is not None and part.stop <= out.n_done:
            continue
        completed = complete_requests(
            loaded.model,
            loaded.tokenizer,
            (Request(task.prompt.text, task.config) for task in tasks[part.start : part.stop]),
            batch_size=layout.batch_size,
            logprobs=layout.as_json,
            draft_model=loaded.draft_model,
            allowed_special=layout.allowed_special,
            on_step=loaded.steps,
        )
        yield from zip(part, completed, strict=True)


def _parts(tasks: Sequence[Task], n_rows: int) -> Iterator[range]:
    """The places of successive tasks that have `n_rows` rows together, or a few more."""
    start, rows = 0, 0
    for place, task in enumerate(tasks, 1):
        rows += task.config.num_return_sequences
        if rows >= n_rows or place == len(tasks):
            yield range(start, place)
            start, rows = place, 0


class _Bar:
    """A bar on stderr, if that is a terminal, with the tokens per second."""

    def __init__(self, total: int, n_done: int, *, is_shown: bool) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(
            total=total, initial=n_done, unit="prompt", leave=False, dynamic_ncols=True, file=sys.stderr,
            disable=not is_shown or None,  # None: no bar if stderr is not a terminal
        )  # fmt: skip
        self._began, self._n_tokens = time.perf_counter(), 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def clear(self) -> None:
        """Make place for a line of text."""
        self._bar.clear()

    def update(self, completions: Sequence[Completion], *, is_new: bool) -> None:
        """Count a prompt's completions; one that is not new is counted for the speed only."""
        self._n_tokens += sum(len(completion.ids) for completion in completions)
        rate = self._n_tokens / max(time.perf_counter() - self._began, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(int(is_new))


def _as_dict(completion: Completion, name: str, task: Task, *, with_timings: bool) -> dict[str, Any]:
    """The object of a continuation. Fields of the prompt's line come first; "input_" is added to names that it has, too."""
    own = _own_fields(completion, name, one_by_one=task.config.num_beams == 1)
    if not with_timings:
        del own["timings"]  # they would differ from run to run
    return {f"input_{key}" if key in own else key: value for key, value in task.prompt.fields.items()} | own


def _own_fields(completion: Completion, name: str, *, one_by_one: bool) -> dict[str, Any]:
    decode_seconds = completion.seconds - completion.seconds_to_first_token
    has_speed = one_by_one and len(completion.ids) > 1 and decode_seconds > 0
    return {
        "prompt": completion.prompt,
        "completion": completion.text,
        "prompt_ids": completion.prompt_ids,
        "ids": completion.ids,
        "logprobs": completion.logprobs,
        **({"top_logprobs": completion.top_logprobs} if completion.top_logprobs else {}),
        "finish_reason": completion.finish_reason,
        "sample": completion.index,
        "seed": completion.seed,
        "model": name,
        "timings": {
            "first_token_seconds": round(completion.seconds_to_first_token, 4),
            "seconds": round(completion.seconds, 4),
            "tokens_per_second": round((len(completion.ids) - 1) / decode_seconds, 2) if has_speed else None,
        },
    }


def _heading(place: int, n_prompts: int, sample: int) -> str:
    return f"== prompt {place + 1} of {n_prompts}, sample {sample + 1} =="


def _stream_text(loaded: Loaded, prompts: list[str], config: GenerationConfig, layout: Layout) -> None:
    """Print the texts in order; with `layout.stream` each piece as it is generated."""
    several = len(prompts) * config.num_return_sequences > 1
    for row, pieces in _texts_in_order(loaded, prompts, config, layout):
        place, sample = divmod(row, config.num_return_sequences)
        if several:
            click.echo(_heading(place, len(prompts), sample), err=True)
        first = next(pieces, "")  # before the prompt is printed: if the model fails, stdout stays empty
        if layout.echo:
            click.echo(prompts[place], nl=False)
        for piece in chain([first], pieces) if layout.stream else [first + "".join(pieces)]:
            click.echo(piece, nl=False)
        click.echo()


def _texts_in_order(
    loaded: Loaded, prompts: list[str], config: GenerationConfig, layout: Layout
) -> Iterator[tuple[int, Iterator[str]]]:
    """(row, its text in pieces) for each row in order.

    The pieces of a row come as they are generated, after those that were generated while earlier rows were read.
    """
    from gpt2.generation.completion import stream_batch

    n_rows = len(prompts) * config.num_return_sequences
    waiting: list[list[str]] = [[] for _ in range(n_rows)]
    ended = [False] * n_rows
    events = stream_batch(
        loaded.model,
        loaded.tokenizer,
        prompts,
        config,
        draft_model=loaded.draft_model,
        allowed_special=layout.allowed_special,
        on_step=loaded.steps,
    )

    def pieces(row: int) -> Iterator[str]:
        while True:
            yield from waiting[row]
            waiting[row].clear()
            if ended[row]:
                return
            other, piece, completion = next(events)
            waiting[other].append(piece)
            ended[other] = ended[other] or completion is not None

    for row in range(n_rows):
        yield row, pieces(row)
