"""Counters and histograms of a server, in a Prometheus registry of its own. It knows jobs, not HTTP."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gpt2.serving.job import Job

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """What `/metrics` shows."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("gpt2_requests", "Answered requests.", ("path", "status"), registry=registry)
        self._seconds = Histogram(
            "gpt2_request_seconds", "Time to the end of the answer.", ("path",), registry=registry, buckets=_SECONDS
        )
        self._first = Histogram("gpt2_first_token_seconds", "Time to the first token.", registry=registry, buckets=_SECONDS)
        self._prompt = Counter("gpt2_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._new = Counter("gpt2_generated_tokens", "Generated tokens.", registry=registry)
        self._ended = Counter("gpt2_jobs", "Requests that the engine has ended.", ("result",), registry=registry)
        self._registry = registry

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a number that is read when `/metrics` is."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def ended(self, job: Job) -> None:
        """Count a job that has ended."""
        self._prompt.inc(job.n_prompt_tokens)
        self._new.inc(job.n_new_tokens)
        if job.first_token_at is not None:
            self._first.observe(job.first_token_at - job.began)
        self._ended.labels("error" if job.error else "ok" if job.n_open == 0 else "cancelled").inc()

    def page(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)
