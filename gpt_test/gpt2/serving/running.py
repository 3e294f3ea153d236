"""A server in a thread of the test process, and a client of the standard library."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from gpt2 import GPT2
from gpt2.generation.chat_template import ChatTemplate
from gpt2.serving.gate import Access
from gpt2.serving.models import Served
from gpt2.serving.server import Server, Settings
from gpt_config import GPT2Config
from gpt_config.errors import CheckpointError
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model

N_POSITIONS = 96
DAMAGED = 60  # the model "damaged" computes NaN for texts of more tokens
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Running:
    """A server that runs, and its models by name."""

    server: Server
    models: Mapping[str, Served]

    @property
    def port(self) -> int:
        return int(self.server.address.rpartition(":")[2])

    def ask(self, path: str, body: object = None, *, headers: Mapping[str, str] | None = None) -> Answer:
        """GET the path, or POST the body: JSON, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, content, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, response.read(), {name.lower(): value for name, value in response.getheaders()})
        finally:
            connection.close()

    def complete(self, **fields: Any) -> dict[str, Any]:
        """The answer of /v1/completions, which must succeed."""
        answer = self.ask("/v1/completions", fields)
        assert answer.status == 200, answer.content
        return answer.json

    def texts(self, **fields: Any) -> list[str]:
        """The texts of the choices."""
        return [choice["text"] for choice in self.complete(**fields)["choices"]]

    def connect(self, content: bytes = b"") -> socket.socket:
        """A socket that has sent `content`."""
        found = socket.create_connection(("127.0.0.1", self.port), timeout=300)
        found.sendall(content)
        return found

    def n_generated(self) -> int:
        """How many tokens the server has generated for jobs that have ended."""
        lines = self.ask("/metrics").content.decode().splitlines()
        return int(float(next(line for line in lines if line.startswith("gpt2_generated_tokens_total")).split()[1]))

    def wait_until_idle(self, seconds: float = 120.0) -> None:
        """Wait until no row has a slot and no job is left, nor comes from what closed connections have sent."""
        engine, n_idle = self.server.engine, 0

        def is_idle() -> bool:
            nonlocal n_idle
            n_idle = 0 if engine.n_running or engine.n_jobs else n_idle + 1
            return n_idle > 10

        wait_until(is_idle, seconds)


@dataclass
class Answer:
    status: int
    content: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.content)
        return found

    @property
    def error(self) -> dict[str, Any]:
        assert list(self.json) == ["error"] and set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The data of the events of a stream; the mark of its end is left as text."""
        data = [line.removeprefix(b"data: ") for line in self.content.split(b"\n") if line]
        return ["[DONE]" if part == b"[DONE]" else json.loads(part) for part in data]


def wait_until(is_so: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it has not become so"
        time.sleep(0.005)


def in_threads(function: Callable[[int], object], numbers: Iterable[int]) -> None:
    """Call the function with each number, all at the same time. Raises the first error of a call."""
    numbers = list(numbers)
    with ThreadPoolExecutor(len(numbers)) as pool:
        list(pool.map(function, numbers))


def post(body: object, path: str = "/v1/completions") -> bytes:
    """A request as bytes."""
    content = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def served_models(tokenizer: GPT2Tokenizer) -> dict[str, Served]:
    """`small`, `chat` with a template, and `damaged`, which computes NaN for long texts."""
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=N_POSITIONS, n_embd=24, n_layer=2, n_head=3,
        bos_token_id=tokenizer.eot_token_id, eos_token_id=tokenizer.eot_token_id,
    )  # fmt: skip
    damaged = random_model(config, seed=2)
    with torch.no_grad():
        damaged.wpe.weight[DAMAGED] = float("nan")
    return {
        "small": Served("small", random_model(config), tokenizer),
        "chat": Served("chat", random_model(config, seed=1), tokenizer, ChatTemplate(TEMPLATE)),
        "damaged": Served("damaged", damaged, tokenizer),
    }


@contextmanager
def running(models: Mapping[str, Served], *, access: Access | None = None, **settings: Any) -> Iterator[Running]:
    """A server of `models` on a free port. Another name, "broken", cannot be loaded."""

    def load(name: str) -> Served:
        if name == "broken":
            raise CheckpointError("the weights are damaged: use another copy")
        return models[name]

    server = Server([*models, "broken"], load, Settings(port=0, access=access or Access(log="none"), **settings))
    is_ready = threading.Event()
    thread = threading.Thread(target=lambda: server.run(lambda served: is_ready.set()), daemon=True)
    thread.start()
    assert is_ready.wait(300)
    try:
        yield Running(server, models)
    finally:
        server.stop()
        thread.join(300)
        assert not thread.is_alive()


def slow_model(model: GPT2, seconds: float) -> GPT2:
    """A copy of a model whose every pass takes this long, so that a test can act while it generates."""
    import copy

    slow = copy.deepcopy(model)
    slow.h[0].register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return slow
