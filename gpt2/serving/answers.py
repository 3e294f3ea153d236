"""The JSON of answers: completions and chats, complete or in chunks. It knows requests and jobs, and no HTTP."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from gpt2.serving.job import Choice, Delta, Job, Work
from gpt2.serving.protocol import Request
from gpt2.serving.token_texts import CompletionArrays, TokenTexts, chat_logprobs

Json = dict[str, Any]


class Answer:
    """The answer to one request. Subclasses say what a choice looks like."""

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, request: Request, job: Job, texts: TokenTexts) -> None:
        self.request, self.job, self.texts = request, job, texts
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": job.served.name,
        }

    def complete(self) -> Json:
        """The answer after the job has ended."""
        choices = [self._choice(index, choice) for index, choice in enumerate(self._best())]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}

    def start(self) -> Iterator[Json]:
        """The chunks before the first token."""
        yield from ()

    def chunks(self, delta: Delta) -> Iterator[Json]:
        """The chunks of a delta. One without text is held back until there is text, or the end."""
        if delta.text or delta.finish_reason:
            yield from self._chunks_of(delta)

    def end(self) -> Iterator[Json]:
        """The chunk with the usage, if it was asked for."""
        if self.request.include_usage:
            yield {**self._head, "object": self.chunk_kind, "choices": [], "usage": self._usage()}

    def _chunk(self, choice: Json) -> Json:
        usage: Json = {"usage": None} if self.request.include_usage else {}
        return {**self._head, "object": self.chunk_kind, "choices": [choice], **usage}

    def _usage(self) -> Json:
        prompt, new = self.job.n_prompt_tokens, self.job.n_new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _best(self) -> list[Choice]:
        """The choices of the answer: with `best_of`, the n of each prompt with the highest mean log-probability."""
        if self.request.best_of == self.request.n:
            return self.job.choices
        return [choice for work in self.job.works for choice in self._best_of(work)]

    def _best_of(self, work: Work) -> list[Choice]:
        def mean(choice: Choice) -> float:
            return sum(choice.row.logprobs) / max(1, len(choice.row.logprobs))

        return sorted(work.choices, key=mean, reverse=True)[: self.request.n]

    def _choice(self, index: int, choice: Choice) -> Json:
        raise NotImplementedError

    def _chunks_of(self, delta: Delta) -> Iterator[Json]:
        raise NotImplementedError


class CompletionAnswer(Answer):
    """The answer of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, request: Request, job: Job, texts: TokenTexts) -> None:
        super().__init__(request, job, texts)
        self._given: dict[int, tuple[CompletionArrays, int]] = {}  # by choice: its arrays, and its ids in chunks so far
        self._works = {choice.index: work for work in job.works for choice in work.choices}

    def _choice(self, index: int, choice: Choice) -> Json:
        work, row = self._works[choice.index], choice.row
        text = self.job.served.tokenizer.decode(work.ids) if self.request.echo else ""
        arrays = self._arrays(choice, CompletionArrays(self.texts), 0, len(row.ids))
        return {
            "index": index,
            "text": text + choice.stream.text,
            "logprobs": arrays,
            "finish_reason": finish_reason(row.finish_reason),
        }

    def _chunks_of(self, delta: Delta) -> Iterator[Json]:
        choice = delta.choice
        arrays, begin = self._given.get(choice.index) or (CompletionArrays(self.texts), 0)
        is_first = choice.index not in self._given
        text = delta.text
        if is_first and self.request.echo:
            text = self.job.served.tokenizer.decode(self._works[choice.index].ids) + text
        self._given[choice.index] = arrays, delta.n_ids
        yield self._chunk(
            {
                "index": choice.index,
                "text": text,
                "logprobs": self._arrays(choice, arrays, begin, delta.n_ids, is_first=is_first),
                "finish_reason": finish_reason(delta.finish_reason),
            }
        )

    def _arrays(
        self, choice: Choice, arrays: CompletionArrays, begin: int, end: int, *, is_first: bool = True
    ) -> Json | None:
        """The arrays of a choice's new tokens from `begin` to `end`; if they are the first, after those of an echo."""
        if self.request.logprobs is None:
            return None
        work, row = self._works[choice.index], choice.row
        ids, logprobs = row.ids[begin:end], [*row.logprobs[begin:end]]
        top = row.top_logprobs[begin:end] if self.request.logprobs else [[] for _ in ids]
        if not (is_first and self.request.echo):
            return arrays.add(ids, logprobs, top)
        assert work.scores is not None
        return arrays.add([*work.ids, *ids], [None, *work.scores.logprobs, *logprobs], [[], *work.scores.top, *top])


class ChatAnswer(Answer):
    """The answer of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: Request, job: Job, texts: TokenTexts) -> None:
        super().__init__(request, job, texts)
        self._n_given: dict[int, int] = {}

    def _choice(self, index: int, choice: Choice) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.stream.text, "refusal": None},
            "logprobs": self._logprobs(choice, 0, len(choice.row.ids)),
            "finish_reason": finish_reason(choice.row.finish_reason),
        }

    def start(self) -> Iterator[Json]:
        """The chunks with the role."""
        for choice in self.job.choices:
            delta = {"role": "assistant", "content": ""}
            yield self._chunk({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _chunks_of(self, delta: Delta) -> Iterator[Json]:
        choice, begin = delta.choice, self._n_given.get(delta.choice.index, 0)
        self._n_given[choice.index] = delta.n_ids
        logprobs = self._logprobs(choice, begin, delta.n_ids)
        if delta.text or (logprobs and logprobs["content"]):
            content = {"content": delta.text}
            yield self._chunk({"index": choice.index, "delta": content, "logprobs": logprobs, "finish_reason": None})
        if delta.finish_reason:
            reason = finish_reason(delta.finish_reason)
            yield self._chunk({"index": choice.index, "delta": {}, "logprobs": None, "finish_reason": reason})

    def _logprobs(self, choice: Choice, begin: int, end: int) -> Json | None:
        if self.request.logprobs is None:
            return None
        row = choice.row
        top = row.top_logprobs[begin:end] if self.request.logprobs else [[] for _ in range(begin, end)]
        return chat_logprobs(self.texts, row.ids[begin:end], row.logprobs[begin:end], top)


def finish_reason(reason: str | None) -> str | None:
    """A row's reason in the API's words: an end token, and a stop string, are both "stop"."""
    return None if reason is None else "length" if reason in ("length", "time") else "stop"


MakeAnswer = Callable[[Request, Job, TokenTexts], Answer]
