"""Engine: who runs when. One thread owns the models' batches; it admits rows between steps, and gives their tokens to jobs.

It knows neither HTTP nor JSON. The rules:

- At most `slots` rows run at a time. A free slot goes to the job with the fewest running rows, and among these to the one
  that came first. So a request with many choices uses the slots that no other request wants.
- At most `max_waiting` jobs wait for their first slot; `submit` refuses more.
- A long prompt's keys and values are computed in parts. The next step of the running rows computes a part too, in one pass
  over the weights. A part has as many tokens as about double the time of that step.
- A pass for the log-probabilities of a prompt or its embedding runs in such parts between the steps.
- Short prompts join whole. A row with few tokens to compute begins in a step of the running rows.
- After such a part, and after short prompts have joined, the running rows take steps for at least as long as that took.
  Prompts that come about double their mean time per token, however many come. Parts and joining rows take turns.
- A cancelled job leaves before the next step.
- After an exception in a step, each row takes its step alone, and only those that fail again end with an error.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from typing import Any, cast

from gpt2.generation import sampling
from gpt2.generation.batch import Batch
from gpt2.generation.processors import Controls
from gpt2.generation.row import Row, end_ids
from gpt2.generation.steps import OneToken, Prefill
from gpt2.serving.fields import ApiError
from gpt2.serving.job import Choice, Job, Pass, Work
from gpt2.serving.lane import Lane
from gpt2.serving.models import Served
from gpt2.serving.prompt_pass import compute_beginning, embed_prompt, score_prompt
from gpt_config.errors import GPT2Error

_log = logging.getLogger("gpt2.serving")

RandomState = tuple[Any, ...]

# The least tokens of a part beside running rows. A step with fewer hardly takes less time.
_LEAST_PART = 8

# How long a part may take, in steps. The times vary, and two steps are the aim for both together.
_SHARE_OF_STEP = 0.75

# Seconds that a part or a join costs at least, so that a step follows it, whatever the clock says.
_LEAST_SECONDS = 1e-9


class Engine:
    """Runs jobs in a thread of its own. `submit` and `cancel` may be called from any thread.

    - `part`: the most tokens of prompts that are computed between two steps of running rows, and of a short prompt. Fewer
      cost more time each.
    - `part_alone`: the same while no row runs.
    - `clock` returns the time in seconds.
    - `observe` is called with each job that has ended, in the engine's thread.
    """

    def __init__(
        self,
        *,
        slots: int = 8,
        max_waiting: int = 64,
        part: int = 32,
        part_alone: int = 256,
        observe: Callable[[Job], object] = lambda job: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.slots, self.max_waiting = slots, max_waiting
        self.n_running = 0  # rows that have a slot
        self._parts, self._observe, self._clock = (part_alone, part), observe, clock
        self._jobs: list[Job] = []  # that have not ended, in the order of their arrival
        self._lanes: dict[Served, Lane] = {}
        self._passes: deque[tuple[Job, Pass]] = deque()  # the first one is under way
        self._n_beside = 0  # rows that run at the start of a turn, and wait for what it computes of prompts
        self._owed = 0.0  # seconds that they must still step before the next part of a prompt, or before others join
        self._joins_next = False  # whether joining rows go before the next part
        # The last ones that were measured beside running rows, in seconds.
        self._step_seconds = self._prompt_token_seconds = 0.0
        self._inbox: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._n_submitted = 0  # jobs in the inbox
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="gpt2-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the current step. Jobs that have not ended get an error."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    @property
    def n_jobs(self) -> int:
        """Jobs that have not ended."""
        return len(self._jobs) + self._n_submitted

    @property
    def n_waiting(self) -> int:
        """Jobs of which nothing runs yet."""
        return sum(job.n_running == 0 and bool(job.ready or job.passes) for job in list(self._jobs)) + self._n_submitted

    @property
    def is_full(self) -> bool:
        """Whether `submit` would refuse a job."""
        return self.n_waiting >= self.max_waiting

    def submit(self, job: Job) -> None:
        """Add a job. Raises ApiError 503 if too many wait."""
        self.check_room()
        with self._changed:
            self._n_submitted += 1
        self._tell(lambda: self._accept(job))

    def check_room(self) -> None:
        """Raise ApiError 503 if too many jobs wait."""
        if self._is_closing:
            raise closing_error()
        if self.is_full:
            raise ApiError(
                f"{self.max_waiting} requests wait already: try again later",
                status=503,
                code="queue_full",
                headers={"retry-after": "1"},
            )

    def cancel(self, job: Job, error: ApiError | None = None) -> None:
        """End a job before the next step; its rows leave their slots."""
        self._tell(lambda: self._end(job, error))

    def cancel_all(self, error: ApiError) -> None:
        """End all jobs with this error before the next step."""
        self._tell(lambda: self._end_all(error))

    def _tell(self, command: Callable[[], object]) -> None:
        with self._changed:
            self._inbox.append(command)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._inbox or self._jobs or self._is_closing):
                    self._changed.wait()
                if self._is_closing:
                    break
            self._turn()
        self._obey()
        self._end_all(closing_error())

    def _turn(self) -> None:
        """Obey, compute some tokens of prompts if no running row has to go first, and take one step of each model."""
        self._obey()
        self._n_beside = sum(lane.n_running for lane in self._lanes.values())
        if not self._n_beside:
            self._owed = 0.0
            self._advance_pass()
            self._admit()
        elif self._owed <= 0:
            first, second = self._advance_pass, self._admit
            if self._joins_next:
                first, second = second, first
            if first():
                self._joins_next = not self._joins_next
            else:
                second()
        for lane in list(self._lanes.values()):
            if lane.is_left or lane.batch.rows:
                self._step(lane)

    def _charge(self, seconds: float, n_tokens: int) -> None:
        """Let the running rows step for as long as the tokens of a prompt took."""
        if self._n_beside:
            self._owed += max(seconds, _LEAST_SECONDS)
            self._prompt_token_seconds = seconds / max(1, n_tokens)

    def _obey(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _accept(self, job: Job) -> None:
        with self._changed:
            self._n_submitted -= 1
        if job.is_over:
            return
        self._jobs.append(job)
        self._next_pass(job)
        self._end_if_complete(job)

    def _part(self) -> int:
        """How many tokens of prompts may be computed before the next step."""
        alone, most = self._parts
        if not self._n_beside:
            return alone
        seconds = _SHARE_OF_STEP * self._step_seconds
        fitting = int(seconds / self._prompt_token_seconds) if self._prompt_token_seconds > 0 else 0
        return min(most, max(_LEAST_PART, fitting - fitting % 8))

    def _admit(self) -> bool:
        """Give free slots to rows, and return whether rows have joined the batch.

        Long prompts have a pass first. Short ones join: one, and those after it that fit in a part together with it.
        """
        longest, n_tokens = self._parts[self._n_beside > 0], 0
        while self.n_running < self.slots:
            job = min((job for job in self._jobs if job.ready), key=lambda job: job.n_running, default=None)
            if job is None:
                break
            choice, lane = job.ready[0], self._lane(job.served)
            n_new = lane.n_to_compute(choice.row)
            is_long = n_new > longest and lane.computes_in_parts(beside_others=self._n_beside > 0)
            if not is_long and n_tokens and n_tokens + n_new > self._part():
                break
            job.ready.popleft()
            lane.choices[id(choice.row)] = choice
            job.n_running += 1
            self.n_running += 1
            if is_long:
                self._passes.append((job, self._begin(lane, choice)))
            else:
                n_tokens += n_new
                lane.admit(choice.row, n_new)
        return n_tokens > 0

    def _begin(self, lane: Lane, choice: Choice) -> Pass:
        """Compute a long prompt in parts; then its row joins the batch."""
        row = choice.row
        if row.beginning is None:
            ids = row.window.visible_ids
            beginning = yield from compute_beginning(
                lane.served.model, ids, lane.prefixes, part=self._part, take_along=lane.take_along
            )
            lane.keep(beginning, choice)
        lane.admit(row, lane.n_to_compute(row))

    def _lane(self, served: Served) -> Lane:
        if served not in self._lanes:
            self._lanes[served] = Lane(served, self.slots)
        return self._lanes[served]

    def _step(self, lane: Lane) -> None:
        lane.is_left, lane.step, n_along, lane.n_along = False, None, lane.n_along, 0
        states = _random_states(lane) if len(lane.choices) > 1 else {}
        n_rounds, began = 1, self._clock()
        try:
            n_rounds = self._read(lane, lane.batch)
        except Exception as error:
            self._isolate(lane, states, error)
        seconds = self._clock() - began
        if isinstance(lane.step, Prefill):
            if lane.step.n_running:  # the running rows got their tokens in the same pass
                seconds = max(0.0, seconds - self._step_seconds)
            self._charge(seconds, lane.n_joining)
            lane.n_joining = 0
        elif isinstance(lane.step, OneToken) and n_along:
            self._prompt_token_seconds = max(0.0, seconds - self._step_seconds) / n_along
        elif lane.step is not None:
            self._owed = max(0.0, self._owed - max(seconds, _LEAST_SECONDS))
            self._step_seconds = seconds / max(1, n_rounds)

    def _read(self, lane: Lane, batch: Batch) -> int:
        """Run a step, give its tokens to the jobs, and return how many tokens a row got at most."""
        n_rounds = 0
        with closing(cast("Generator[list[Row]]", batch.step())) as rounds:
            for advanced in rounds:
                n_rounds += 1
                for row in advanced:
                    if (choice := lane.choices.get(id(row))) is not None:
                        self._give(lane, choice)
        return n_rounds

    def _give(self, lane: Lane, choice: Choice) -> None:
        try:
            choice.job.give(choice, choice.stream.read(choice.row))
        except Exception as error:  # a token without text, in a vocabulary with gaps
            choice.row.finish_reason = "stop"
            self._fail(choice.job, error)
            return
        if choice.row.finish_reason:
            self._release(lane, choice)
            choice.job.n_open -= 1
            self._end_if_complete(choice.job)

    def _isolate(self, lane: Lane, states: dict[int, RandomState], error: Exception) -> None:
        """After an exception in a step: take the step of each row alone, and end the rows that fail again."""
        rows = lane.batch.rows
        lane.renew()
        for row in rows:
            choice = lane.choices.get(id(row))
            if choice is None:
                continue  # its job has ended with another row
            if len(rows) == 1:
                self._fail(choice.job, error)
                return
            if id(row) in states:
                row.generator.setstate(states[id(row)])
            alone = lane.alone()
            try:
                alone.admit([row])
                self._read(lane, alone)
            except Exception as own_error:
                self._fail(choice.job, own_error)
            else:
                if row.finish_reason is None:
                    lane.batch.admit([row])

    def _advance_pass(self) -> bool:
        """Take one part of the first pass, and return whether there was one.

        The passes of a job over its prompts take turns with those of other jobs.
        """
        if not self._passes:
            return False
        (job, parts), began, n_tokens = self._passes[0], self._clock(), self._part()
        try:
            next(parts)
            if not any(lane.n_along for lane in self._lanes.values()):  # otherwise the step shows what it costs
                self._charge(self._clock() - began, n_tokens)
        except StopIteration:
            self._passes.popleft()
            self._next_pass(job)
            self._end_if_complete(job)
        except Exception as error:
            self._fail(job, error)
        return True

    def _next_pass(self, job: Job) -> None:
        if job.passes:
            self._passes.append((job, self._pass_over(job, job.passes.popleft())))

    def _pass_over(self, job: Job, work: Work) -> Pass:
        model, vocab_size = job.served.model, job.served.tokenizer.vocab_size
        if work.is_embedded:
            work.vector = yield from embed_prompt(model, work.ids, part=self._part)
            job.n_open -= 1
            return
        assert work.n_top is not None
        work.scores = yield from score_prompt(model, work.ids, work.n_top, vocab_size=vocab_size, part=self._part)
        for choice in work.choices:
            self._first_token(choice, work)
            if choice.row.finish_reason is None:
                job.ready.append(choice)
            else:
                job.n_open -= 1

    def _first_token(self, choice: Choice, work: Work) -> None:
        """Choose the first token of a row with the logits of the pass over its prompt."""
        row, served = choice.row, choice.job.served
        assert work.scores is not None
        if row.n_tokens_left == 0:
            row.finish_reason = "length"
        else:
            logits, ends = work.scores.last_logits, end_ids(row.config, served.model.config)
            vocab_size = served.tokenizer.vocab_size
            [token] = sampling.choose(logits, [row.text], Controls(row.config, ends, row.processors), vocab_size)
            if row.config.top_logprobs:
                row.top_logprobs += sampling.top_logprobs_of(logits, row.config.top_logprobs, vocab_size)
            row.append(token, sampling.logprobs_of(logits, [token])[0], ends)
        choice.job.give(choice, choice.stream.read(row))

    def _release(self, lane: Lane, choice: Choice) -> None:
        if lane.choices.pop(id(choice.row), None) is not None:
            choice.job.n_running -= 1
            self.n_running -= 1

    def _end_all(self, error: ApiError) -> None:
        for job in list(self._jobs):
            self._end(job, error)

    def _end_if_complete(self, job: Job) -> None:
        if job.n_open == 0 and not job.is_over:
            self._end(job, None)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job whose row, prompt or step has raised an error."""
        if isinstance(error, GPT2Error):
            reason, code = str(error), "generation_failed"
        else:
            reason, code = f"the server failed; its log has the reason ({type(error).__name__})", "internal_error"
        number = secrets.token_hex(6)
        _log.error("error %s: %s", number, error, exc_info=None if isinstance(error, GPT2Error) else error)
        self._end(job, ApiError(f"{reason} (error {number})", status=500, code=code))

    def _end(self, job: Job, error: ApiError | None) -> None:
        if job.is_over:
            return
        lane = self._lanes.get(job.served)
        for choice in job.choices:
            if choice.row.finish_reason is None:
                choice.row.finish_reason = "stop"  # the batch removes it before its next step
            if lane is not None and id(choice.row) in lane.choices:
                self._release(lane, choice)
                lane.is_left = True
        job.ready.clear()
        job.passes.clear()
        self._passes = deque((other, parts) for other, parts in self._passes if other is not job)
        with suppress(ValueError):
            self._jobs.remove(job)
        job.error = job.error or error
        self._observe(job)  # before the client has its answer, so that the metrics include it
        job.end()


def closing_error() -> ApiError:
    """The error of requests while the server closes."""
    return ApiError("the server is closing: try again later", status=503, code="closing", headers={"retry-after": "5"})


def _random_states(lane: Lane) -> dict[int, RandomState]:
    """The random states of the rows that draw tokens, so that a step can be taken again."""
    rows: list[Row] = [choice.row for choice in lane.choices.values()]
    return {id(row): _state(row.generator) for row in rows if not row.config.greedy}


def _state(generator: random.Random) -> RandomState:
    return generator.getstate()
