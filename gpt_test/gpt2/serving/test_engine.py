"""The engine without HTTP: an error in the choice of one row's token, and a long prompt beside a running row."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2 import complete
from gpt2.fast.plan import DecodePlan
from gpt2.generation.loop import start
from gpt2.generation.text_stream import TextStream
from gpt2.quantization.quantize import quantize_int8
from gpt2.serving.engine import Engine
from gpt2.serving.fields import ApiError
from gpt2.serving.job import Choice, Job, Work
from gpt2.serving.models import Served
from gpt_config import GenerationConfig


def fail_later(ids: Tensor, logits: Tensor) -> Tensor:
    if ids.shape[1] > 8:
        raise RuntimeError("out of luck")
    return logits


def job_of(served: Served, processors: tuple[Any, ...], *, prompt: Sequence[int] = (65, 66), **options: Any) -> Job:
    config = GenerationConfig(**{"max_new_tokens": 20, "do_sample": True, "seed": 1, "stop_at_eot": False, **options})
    job = Job(served)
    rows = start(served.model, [list(prompt)], config, processors=processors)
    choices = [Choice(job, number, row, TextStream(served.tokenizer, ())) for number, row in enumerate(rows)]
    job.add(Work(rows[0].prompt_ids, choices))
    return job


def test_a_row_whose_step_is_taken_again_draws_the_same_numbers(served: Mapping[str, Served]) -> None:
    """The first row has its token before the second one fails; it then takes the step again, with the same text."""
    small = served["small"]
    [wanted] = complete(
        small.model, small.tokenizer, [[65, 66]], max_new_tokens=20, do_sample=True, seed=1, stop_at_eot=False
    )

    async def run() -> str:
        engine = Engine(slots=2)
        first, second = job_of(small, ()), job_of(small, (fail_later,))
        for job in (first, second):
            engine.submit(job)
        engine.start()
        await first.finished()
        with pytest.raises(ApiError, match="RuntimeError"):
            await second.finished()
        await asyncio.to_thread(engine.close)
        return first.choices[0].stream.text

    assert asyncio.run(run()) == wanted.text


class Clock:
    """Counts what a plan computes in place of time. `cost` is the time of a pass over a number of tokens of one prompt.

    A step that computes a part of a prompt too takes as long as both.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: Callable[[int], float]) -> None:
        self.seconds, self.n_tokens = 0.0, list[int]()
        compute, step = DecodePlan.hidden_states, DecodePlan.hidden_states_of_slots

        def computed(plan: DecodePlan, input_ids: Tensor, **rest: Any) -> Tensor:
            self._add(input_ids.shape[1], cost)
            return compute(plan, input_ids, **rest)

        def stepped(plan: DecodePlan, texts: Sequence[Sequence[int]], *args: Any) -> Tensor:
            self._add(1, cost)
            if len(texts[-1]) > 1:
                self._add(len(texts[-1]), cost)
            return step(plan, texts, *args)

        monkeypatch.setattr(DecodePlan, "hidden_states", computed)
        monkeypatch.setattr(DecodePlan, "hidden_states_of_slots", stepped)

    def _add(self, n_tokens: int, cost: Callable[[int], float]) -> None:
        self.n_tokens.append(n_tokens)
        self.seconds += cost(n_tokens)

    def __call__(self) -> float:
        return self.seconds


def times_of_tokens(
    engine: Engine, clock: Clock, one: Served, others: Callable[[], list[Job]], n_tokens: int = 90
) -> list[float]:
    """When a running text gets its tokens, of which the sixth and later ones come beside `others`."""
    times: list[float] = []

    async def run() -> None:
        later = others()

        def look(ids: Tensor, logits: Tensor) -> Tensor:
            times.append(clock.seconds)
            if len(times) == 5:
                for job in later:
                    engine.submit(job)
            return logits

        first = job_of(one, (look,), max_new_tokens=n_tokens)
        engine.submit(first)
        engine.start()
        for job in (first, *later):
            await job.finished()
        await asyncio.to_thread(engine.close)

    asyncio.run(run())
    return times


def test_short_prompts_that_come_together_hold_a_running_row_up_one_at_a_time(
    served: Mapping[str, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 prompts of 24 tokens take as long as 3 steps each. After each, the running row has 3 steps before the next one."""
    clock = Clock(monkeypatch, lambda n_tokens: max(1, n_tokens // 8))
    prompts = [[65 + number, *[66, 67] * 11, 68] for number in range(12)]
    small = served["small"]
    times = times_of_tokens(
        Engine(slots=16, clock=clock),
        clock,
        small,
        lambda: [job_of(small, (), prompt=prompt, max_new_tokens=60) for prompt in prompts],
    )
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert sorted(set(gaps)) == [1, 4] and gaps.count(4) == 12
    long = [place for place, gap in enumerate(gaps) if gap == 4]
    assert min(after - before for before, after in itertools.pairwise(long)) >= 3, gaps


@pytest.mark.parametrize(("step", "part"), [(8, 24), (1, 8), (40, 32)])
def test_a_part_of_a_long_prompt_takes_about_as_long_as_a_step(
    served: Mapping[str, Served], monkeypatch: pytest.MonkeyPatch, step: float, part: int
) -> None:
    """Four tokens of a prompt take one second, and a part 3/4 of a step.

    The first part has the fewest tokens, because no part was timed before.

    Each part takes a step along, so the running text has a token after each.
    """
    clock = Clock(monkeypatch, lambda n_tokens: step if n_tokens == 1 else n_tokens / 4)
    small = served["small"]
    engine = Engine(slots=2, clock=clock)
    times = times_of_tokens(engine, clock, small, lambda: [job_of(small, (), prompt=[65, *[66, 67] * 40], max_new_tokens=4)])
    _, *parts = [n for n in clock.n_tokens if n > 1]
    assert parts[:2] == [8, part] and sum(parts) == 80  # the last token of the prompt takes a step
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert max(gaps) == step + part / 4


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "float32"])
def test_a_long_prompt_comes_in_parts_with_the_steps_of_a_running_row(
    served: Mapping[str, Served], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Two texts of one prompt of 81 tokens, in parts of 8, while another text runs, which gets a token with each part."""
    model = copy.deepcopy(served["small"].model)
    one = Served(kind, quantize_int8(model) if kind == "int8" else model.to(getattr(torch, kind)), served["small"].tokenizer)
    seen: list[int] = []  # tokens of the first text: when the others are asked for, and when each has its first token
    clock = Clock(monkeypatch, lambda n_tokens: 3 if n_tokens > 1 else 1)

    async def run() -> None:
        engine = Engine(slots=3, part=8, clock=clock)

        def ask(ids: Tensor, logits: Tensor) -> Tensor:
            if len(ids[0]) == 5:
                seen.append(len(first.choices[0].row.ids))
                engine.submit(long)
            return logits

        def look(ids: Tensor, logits: Tensor) -> Tensor:
            if len(ids[0]) == 81:
                seen.append(len(first.choices[0].row.ids))
            return logits

        first = job_of(one, (ask,), max_new_tokens=90)
        long = job_of(one, (look,), prompt=[65, *[66, 67] * 40], max_new_tokens=4, num_return_sequences=2)
        engine.submit(first)
        engine.start()
        for job in (first, long):
            await job.finished()
        assert all(len(choice.row.ids) == 4 and choice.row.beginning is None for choice in long.choices)
        await asyncio.to_thread(engine.close)

    asyncio.run(run())
    began, *others = seen
    assert [10 <= n - began <= 14 for n in others] == [True] * 2, seen
