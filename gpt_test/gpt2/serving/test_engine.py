"""The engine without HTTP: an error in the choice of one row's token, and a long prompt beside a running row."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
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


@pytest.mark.parametrize(("kind", "n_steps"), [("bfloat16", 1), ("int8", 1), ("float32", 1), ("float32", 3)])
def test_a_long_prompt_comes_in_parts_beside_a_running_row(
    served: Mapping[str, Served], monkeypatch: pytest.MonkeyPatch, kind: str, n_steps: int
) -> None:
    """Two texts of one prompt of 81 tokens, in parts of 8, while another text runs. A part takes as long as `n_steps` steps
    of the other text, which then takes these steps before the next part.
    """
    model = copy.deepcopy(served["small"].model)
    one = Served(kind, quantize_int8(model) if kind == "int8" else model.to(getattr(torch, kind)), served["small"].tokenizer)
    seen: list[int] = []  # tokens of the first text: when the others are asked for, and when each has its first token
    seconds, compute = [0], DecodePlan.hidden_states

    def counted(self: DecodePlan, input_ids: Tensor, **rest: Any) -> Tensor:
        seconds[0] += n_steps if input_ids.shape[1] > 1 else 1
        return compute(self, input_ids, **rest)

    monkeypatch.setattr(DecodePlan, "hidden_states", counted)

    async def run() -> None:
        engine = Engine(slots=3, part=8, clock=lambda: seconds[0])

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
    assert [9 * n_steps <= n - began <= 9 * n_steps + 6 for n in others] == [True] * 2, seen
