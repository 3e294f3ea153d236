"""Engine: who runs when. One thread owns the models' batches; it admits rows between steps, and gives their tokens to jobs.

It knows neither HTTP nor JSON. The rules:

- At most `slots` rows run at a time. A free slot goes to the job with the fewest running rows, and among these to the one
  that came first. So a request with many choices uses the slots that no other request wants.
- At most `max_waiting` jobs wait for their first slot; `submit` refuses more.
- A pass over a prompt (its log-probabilities, its embedding, or a long prompt's keys and values) runs in parts between the
  steps of the rows, so that a running row waits for one part only. After a part, the rows take steps for at least as long as
  it took: a prompt that comes about doubles their mean time per token.
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

import torch

from gpt2.fast.plan import DecodePlan
from gpt2.generation import sampling
from gpt2.generation.batch import Batch
from gpt2.generation.prefix_cache import Prefix, PrefixCache
from gpt2.generation.processors import Controls
from gpt2.generation.row import Row, end_ids
from gpt2.generation.slot_batch import SlotBatch, Slots
from gpt2.quantization.derived import state_of
from gpt2.quantization.quantize import is_int8
from gpt2.serving.fields import ApiError
from gpt2.serving.job import Choice, Job, Pass, Work
from gpt2.serving.models import Served
from gpt2.serving.prompt_pass import compute_beginning, embed_prompt, score_prompt
from gpt_config.errors import GPT2Error

_log = logging.getLogger("gpt2.serving")

RandomState = tuple[Any, ...]


class Lane:
    """The rows of one model: its batch, and the choice of each row that has a slot."""

    def __init__(self, served: Served, n_slots: int) -> None:
        self.served, model = served, served.model
        self.choices: dict[int, Choice] = {}  # by the row's id
        self.is_left = False  # whether a row was taken out of the batch since its last step
        self.prefixes = PrefixCache(max(2**28, 2 * served.bytes_per_slot), keep_texts=True)
        self.prefixes.use_for(state_of(*model.parameters()))
        # Where `Decoder` uses the prefixes.
        self.reuses = model.dtype in (torch.float32, torch.float64) and not is_int8(model) and DecodePlan.fits(model)
        self._slots = Slots(model, n_slots) if SlotBatch.fits(model) else None
        self.batch = self._new_batch()

    def renew(self) -> None:
        """Begin with an empty batch."""
        if isinstance(self.batch, SlotBatch):
            self.batch.close()
        self.batch = self._new_batch()

    def _new_batch(self) -> Batch:
        model, vocab_size, draft_model = self.served.model, self.served.tokenizer.vocab_size, self.served.draft_model
        if self._slots is None:
            return Batch(model, vocab_size=vocab_size, draft_model=draft_model, prefix_cache=self.prefixes)
        return SlotBatch(model, self._slots, vocab_size=vocab_size, draft_model=draft_model, prefix_cache=self.prefixes)

    def alone(self) -> Batch:
        """A batch for a row that is tried alone."""
        return Batch(self.served.model, vocab_size=self.served.tokenizer.vocab_size)

    def n_to_compute(self, row: Row) -> int:
        """How many tokens of a prompt have no keys and values yet."""
        ids = row.window.visible_ids
        return len(ids) - (len(row.beginning.ids) if row.beginning else self.prefixes.find(ids)[0])

    def computes_in_parts(self, *, beside_others: bool) -> bool:
        """Whether a long prompt is computed in parts. In fewer bits they are rounded differently, so only beside others."""
        return self.reuses or (beside_others and self._slots is not None)

    def keep(self, beginning: Prefix, choice: Choice) -> None:
        """Give a beginning to the choice for which it was computed, and to those of its prompt that have not begun."""
        if self.reuses:
            self.prefixes.add(beginning)
            return
        n_ids, n_tokens = len(choice.row.window.ids), len(beginning.ids)
        for row in (other.row for other in choice.job.choices):
            if len(row.window.ids) == n_ids and tuple(row.window.ids[:n_tokens]) == beginning.ids:
                row.beginning = beginning


class Engine:
    """Runs jobs in a thread of its own. `submit` and `cancel` may be called from any thread.

    - `part`: the most tokens of prompts that are computed between two steps of running rows. Fewer cost more time each.
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
        self._has_joined = False  # whether rows have joined for the last step
        self._n_stepping = 0  # rows that were given a token by the last steps
        self._owed = 0.0  # seconds that they must still step before the next part of a prompt
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
        """Obey, admit, and take one part of a pass and one step of each model."""
        self._obey()
        if self._owed <= 0:
            self._advance_pass()
        self._admit()
        self._n_stepping, began = 0, self._clock()
        for lane in list(self._lanes.values()):
            if lane.is_left or lane.batch.rows:
                self._step(lane)
        self._owed = max(0.0, self._owed - (self._clock() - began)) if self._n_stepping else 0.0

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
        return self._parts[self._n_stepping > 0]

    def _admit(self) -> None:
        """Give free slots to rows. Long prompts have a pass first; as many short ones as a part has tokens join the batch.

        Between two steps in which rows join, there is one in which all rows get a token.
        """
        if self._has_joined and self._n_stepping:
            self._has_joined = False
            return
        n_tokens = 0
        while self.n_running < self.slots and n_tokens < self._part():
            job = min((job for job in self._jobs if job.ready), key=lambda job: job.n_running, default=None)
            if job is None:
                return
            choice = job.ready.popleft()
            lane = self._lane(job.served)
            lane.choices[id(choice.row)] = choice
            job.n_running += 1
            self.n_running += 1
            n_new = lane.n_to_compute(choice.row)
            if n_new > self._part() and lane.computes_in_parts(beside_others=self._n_stepping > 0):
                self._passes.append((job, self._begin(lane, choice)))
            else:
                n_tokens += n_new
                lane.batch.admit([choice.row])
                self._has_joined = True

    def _begin(self, lane: Lane, choice: Choice) -> Pass:
        """Compute a long prompt in parts; then its row joins the batch."""
        row = choice.row
        if row.beginning is None:
            ids = row.window.visible_ids
            beginning = yield from compute_beginning(lane.served.model, ids, lane.prefixes, part=self._part)
            lane.keep(beginning, choice)
        lane.batch.admit([row])

    def _lane(self, served: Served) -> Lane:
        if served not in self._lanes:
            self._lanes[served] = Lane(served, self.slots)
        return self._lanes[served]

    def _step(self, lane: Lane) -> None:
        lane.is_left = False
        states = _random_states(lane) if len(lane.choices) > 1 else {}
        try:
            self._read(lane, lane.batch)
        except Exception as error:
            self._isolate(lane, states, error)

    def _read(self, lane: Lane, batch: Batch) -> None:
        """Run a step and give its tokens to the jobs."""
        with closing(cast("Generator[list[Row]]", batch.step())) as rounds:
            for advanced in rounds:
                self._n_stepping += len(advanced)
                for row in advanced:
                    if (choice := lane.choices.get(id(row))) is not None:
                        self._give(lane, choice)

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

    def _advance_pass(self) -> None:
        """Take one part of the first pass. The passes of a job over its prompts take turns with those of other jobs."""
        if not self._passes:
            return
        (job, parts), began = self._passes[0], self._clock()
        try:
            next(parts)
            self._owed = self._clock() - began if self._n_stepping else 0.0
        except StopIteration:
            self._passes.popleft()
            self._next_pass(job)
            self._end_if_complete(job)
        except Exception as error:
            self._fail(job, error)

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
