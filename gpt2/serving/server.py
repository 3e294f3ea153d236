"""Runs the application: the socket, signals, loading of the first model, and the end. It depends on uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import uvicorn

from gpt2.serving.app import Application
from gpt2.serving.engine import Engine, closing_error
from gpt2.serving.fields import ApiError
from gpt2.serving.gate import Access, access_log, is_loopback
from gpt2.serving.metrics import Metrics
from gpt2.serving.models import Models, Served
from gpt_config.errors import InputError

# Seconds between two looks whether all jobs have ended.
_POLL = 0.05


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve. `grace`: seconds that running requests have to end after SIGTERM. The other numbers are `Engine`'s."""

    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 8
    max_waiting: int = 64
    part: int = 32
    part_alone: int = 256
    grace: float = 30.0
    no_auth: bool = False
    access: Access = field(default_factory=Access)

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and self.access.api_key is None and not self.no_auth:
            raise InputError(
                f"host={self.host} lets other machines in without a key: set an API key, or allow it with no_auth"
            )


class Server:
    """A server that is not yet started. `run` blocks; `stop` may be called from any thread."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Served], settings: Settings) -> None:
        self._settings, metrics = settings, Metrics()
        self.engine = Engine(
            slots=settings.slots,
            max_waiting=settings.max_waiting,
            part=settings.part,
            part_alone=settings.part_alone,
            observe=metrics.ended,
        )
        self._models = Models(names, load)
        self.application = Application(self._models, self.engine, settings.access, metrics)
        self._socket = bound_socket(settings.host, settings.port)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._uvicorn: uvicorn.Server | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """The URL, with the port that was free if the settings have 0."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, on_ready: Callable[[Served], object] = lambda served: None) -> None:
        """Serve until `stop` or a signal. `on_ready` gets the first model, once loaded. Raises what loading it raises."""
        asyncio.run(self._serve(on_ready))

    def stop(self) -> None:
        """End as SIGTERM does. Calling it again changes nothing."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop)

    async def _serve(self, on_ready: Callable[[Served], object]) -> None:
        self._loop = asyncio.get_running_loop()
        config = uvicorn.Config(
            self.application.asgi,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            http="h11",
            ws="none",
            timeout_graceful_shutdown=5,
        )
        self._uvicorn = _Uvicorn(config)
        self.engine.start()
        try:
            with self._signals():
                serving = asyncio.ensure_future(self._uvicorn.serve(sockets=[self._socket]))
                loading = asyncio.ensure_future(self._load(on_ready))
                await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
                if loading.done() and loading.exception() is not None:
                    self._uvicorn.should_exit = True
                await serving
                await loading
        finally:
            self._socket.close()
            await asyncio.to_thread(self.engine.close)

    async def _load(self, on_ready: Callable[[Served], object]) -> None:
        try:
            served = await self._models.get(None)
        except ApiError as error:
            raise error.__cause__ or error from None
        self.application.is_ready = True
        if not self.application.is_closing:
            on_ready(served)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server, where this is the main thread and the system has signals for it."""
        assert self._loop is not None
        names = [signal.SIGTERM, signal.SIGINT]
        try:
            for name in names:
                self._loop.add_signal_handler(name, self._signalled)
        except (NotImplementedError, RuntimeError, ValueError):
            names = []
        try:
            yield
        finally:
            for name in names:
                self._loop.remove_signal_handler(name)

    def _signalled(self) -> None:
        if self._closing is not None:  # the second signal: at once, because the engine's thread may be within a long step
            sys.stderr.flush()
            os._exit(1)
        self._stop()

    def _stop(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        """Refuse new requests, wait for the running ones, and then end those that are left with an error."""
        assert self._uvicorn is not None and self._loop is not None
        self.application.is_closing = True
        end = self._loop.time() + self._settings.grace
        while self.engine.n_jobs and self._loop.time() < end:
            await asyncio.sleep(_POLL)
        self.engine.cancel_all(closing_error())
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own handling of signals, which would close the socket before `/health` says so."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address. Raises InputError if it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"host={host} is not an address of this machine ({error.strerror}): use 127.0.0.1") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        found.close()
        raise InputError(
            f"port={port} on {host} cannot be used ({error.strerror}): choose another, or 0 for a free one"
        ) from None
    return found


def log_to_stderr() -> None:
    """Write the access log, and errors with their number, to standard error, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("gpt2.serving")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.ERROR)
    access_log.setLevel(logging.INFO)
