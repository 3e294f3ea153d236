"""Job: one request with its rows, between the engine's thread and the event loop. It knows no HTTP and no JSON."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field

from gpt2.generation.row import Row
from gpt2.generation.text_stream import TextStream
from gpt2.serving.fields import ApiError
from gpt2.serving.models import Served
from gpt2.serving.prompt_pass import PromptScores

# Advances a prompt by one part of its tokens.
Pass = Generator[None, None, None]


@dataclass(eq=False)
class Choice:
    """One continuation: its row, its growing text, and its number in the request."""

    job: Job
    index: int
    row: Row
    stream: TextStream


@dataclass(eq=False)
class Work:
    """One prompt of a job and its continuations. `n_top`: score its tokens first, with this number of alternatives."""

    ids: list[int]
    choices: list[Choice] = field(default_factory=list)
    n_top: int | None = None
    scores: PromptScores | None = None
    is_embedded: bool = False
    vector: list[float] | None = None

    @property
    def needs_pass(self) -> bool:
        """Whether the prompt has a pass of its own before its rows run."""
        return self.n_top is not None or self.is_embedded


@dataclass
class Delta:
    """What a choice has got since the last one: text, and the ids before `n_ids` that no delta had."""

    choice: Choice
    text: str
    n_ids: int
    finish_reason: str | None


class Job:
    """A request: prompts with their continuations. The engine's thread gives, and the event loop takes.

    Deltas of a choice are merged until they are taken, so a slow reader holds at most the text of its rows in memory and
    delays no other client.
    """

    def __init__(self, served: Served, *, is_stream: bool = False) -> None:
        self.served, self.is_stream = served, is_stream
        self.works: list[Work] = []
        # Of the engine: prompts that still need a pass, choices that may start, the choices that have not ended.
        self.passes: deque[Work] = deque()
        self.ready: deque[Choice] = deque()
        self.n_running = self.n_open = 0
        self.began = time.perf_counter()
        self.first_token_at: float | None = None
        self.error: ApiError | None = None
        self.is_over = False
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        self._lock = threading.Lock()
        self._deltas: dict[int, Delta] = {}

    def add(self, work: Work) -> None:
        """Add a prompt."""
        self.works.append(work)
        self.n_open += len(work.choices) + work.is_embedded
        if work.needs_pass:
            self.passes.append(work)
        else:
            self.ready.extend(work.choices)

    @property
    def choices(self) -> list[Choice]:
        """All continuations, in their order."""
        return [choice for work in self.works for choice in work.choices]

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(work.ids) for work in self.works)

    @property
    def n_new_tokens(self) -> int:
        """Tokens of all continuations so far."""
        return sum(len(choice.row.ids) for choice in self.choices)

    def give(self, choice: Choice, text: str) -> None:
        """Say that a choice has advanced by `text`, perhaps to its end."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        if not self.is_stream:
            return
        with self._lock:
            known = self._deltas.get(choice.index)
            text = text if known is None else known.text + text
            self._deltas[choice.index] = Delta(choice, text, len(choice.row.ids), choice.row.finish_reason)
        self._notify()

    def end(self) -> None:
        """Say that nothing more will come; `error` is set before."""
        self.is_over = True
        self._notify()

    def _notify(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: no client waits
            self._loop.call_soon_threadsafe(self._wake.set)

    async def take(self) -> list[Delta]:
        """Wait for deltas and return them; an empty list after the last one. Raises the job's error."""
        while True:
            is_over = self.is_over  # read first: what is given before it is set is then in the deltas
            with self._lock:
                found, self._deltas = list(self._deltas.values()), {}
            if found:
                return found
            if is_over:
                if self.error is not None:
                    raise self.error
                return []
            await self._wake.wait()
            self._wake.clear()

    async def finished(self) -> None:
        """Wait for the end. Raises the job's error."""
        while await self.take():
            pass
