"""Clients that leave, read slowly, or are too many; and the end of the server."""

from __future__ import annotations

import itertools
import random
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gpt2.serving.models import Served
from gpt_test.gpt2.serving.running import (
    N_POSITIONS,
    Running,
    in_threads,
    post,
    running,
    slow_model,
    wait_until,
)

LONG = {"prompt": "the cat", "max_tokens": 80, "model": "slow", "ignore_eos": True, "temperature": 0}


def reset(client: socket.socket) -> None:
    """Close the connection with a reset, as a killed process does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["close", "reset"])
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"echo": True, "logprobs": 1}, {"n": 20}], ids=str)
def test_a_client_that_leaves_frees_its_slots(server: Running, fields: dict[str, Any], leave: Any) -> None:
    """Each text has 80 tokens of 10 ms, and ends after few of them."""
    engine, before = server.server.engine, server.n_generated()
    client = server.connect(post({**LONG, **fields}))
    wait_until(lambda: engine.n_running > 0)
    if "stream" in fields:
        assert client.recv(1000)
    leave(client)
    server.wait_until_idle()
    assert server.n_generated() - before < 50 * min(4, fields.get("n", 1))
    assert server.texts(prompt="the cat", max_tokens=1, temperature=0)


def test_clients_that_leave_at_each_stage(server: Running) -> None:
    """In the head, in the body, in the queue, in the answer: the server goes on."""
    whole = post({**LONG, "stream": True})
    in_queue = [server.connect(post(LONG)) for _ in range(6)]
    wait_until(lambda: server.server.engine.n_jobs == 6)
    for n_bytes in (1, 20, whole.index(b"{"), len(whole) - 1, len(whole)):
        server.connect(whole[:n_bytes]).close()
    for client in reversed(in_queue):
        client.close()
    server.wait_until_idle()
    assert server.ask("/health").status == 200


def test_a_slow_reader_holds_nobody_up(server: Running) -> None:
    """Streams that no client reads end in the engine, with all their text still to come, and another client is answered."""
    body = {**LONG, "prompt": ["the cat"] * 4, "logprobs": 20, "model": "small", "stream": True}
    slow = [server.connect() for _ in range(2)]
    for client in slow:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.sendall(post(body))
    assert server.texts(prompt="a", max_tokens=3, temperature=0)
    server.wait_until_idle()
    for client in slow:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        content = b""
        while b"[DONE]" not in content[-100:]:
            part = client.recv(65536)
            assert part
            content += part
        client.close()
        assert content.count(b'"finish_reason":"length"') == 4


def test_a_full_queue_answers_at_once(server: Running) -> None:
    """Four slots and eight places: the next request gets 503 with Retry-After."""
    engine = server.server.engine
    clients = [server.connect(post(LONG)) for _ in range(4)]
    wait_until(lambda: engine.n_running == 4)
    clients += [server.connect(post(LONG)) for _ in range(8)]
    wait_until(lambda: engine.n_waiting == 8)
    for path, body in (("/v1/completions", LONG), ("/v1/embeddings", {"input": "a"})):
        answer = server.ask(path, body)
        assert (answer.status, answer.error["code"]) == (503, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
    assert server.ask("/health").status == 200
    for client in clients:
        client.close()
    server.wait_until_idle()


def test_a_request_with_many_choices_does_not_make_others_wait(server: Running) -> None:
    """20 choices on four slots; a client that comes later gets the first slot that is free, not the twentieth."""
    many = server.connect(post({**LONG, "n": 20, "max_tokens": 20}))
    wait_until(lambda: server.server.engine.n_running == 4)
    assert server.texts(prompt="a dog", max_tokens=1, model="slow")
    assert server.server.engine.n_jobs, "the other one has not ended"
    many.close()
    server.wait_until_idle()


def test_running_streams_do_not_wait_for_a_long_prompt(served: Mapping[str, Served]) -> None:
    """A prompt of 90 tokens comes in parts of at most 32, and between two of them the stream gets a token."""
    small = served["small"]
    model = slow_model(small.model, 0.002)
    n_tokens: list[int] = []
    model.h[0].register_forward_pre_hook(lambda module, args: n_tokens.append(args[0].shape[1]))
    with running({"small": Served("small", model, small.tokenizer)}, slots=2) as server:
        stream = server.connect(post({"prompt": "a", "max_tokens": 90, "stream": True, "ignore_eos": True}))
        wait_until(lambda: server.server.engine.n_running == 1)
        server.complete(prompt=[65] * 90, max_tokens=1, echo=True, logprobs=0)
        stream.close()
    long = [place for place, n in enumerate(n_tokens) if n >= 8]
    assert len(long) > 1 and max(n_tokens) <= 32
    assert all(after - before > 1 for before, after in itertools.pairwise(long))


def test_closing(served: Mapping[str, Served]) -> None:
    """Health and new requests get 503; a short request ends, and a long one gets an event with an error."""
    slow = Served("slow", slow_model(served["small"].model, 0.05), served["small"].tokenizer)
    with running({"slow": slow}, grace=2.5, slots=2) as server, ThreadPoolExecutor(2) as pool:
        body = {**LONG, "stream": True}
        long = pool.submit(server.ask, "/v1/completions", body)
        wait_until(lambda: server.server.engine.n_running == 1)
        short = pool.submit(server.ask, "/v1/completions", {**body, "max_tokens": 5})
        wait_until(lambda: server.server.engine.n_running == 2)
        server.server.stop()
        wait_until(lambda: server.ask("/health").status == 503)
        assert server.ask("/health").json == {"status": "closing"}
        refused = server.ask("/v1/completions", LONG)
        assert (refused.status, refused.error["code"]) == (503, "closing")
        assert short.result().events[-1] == "[DONE]"
        *chunks, error = long.result().events
    assert len(chunks) > 3 and error["error"]["code"] == "closing"


def load(server: Running, seconds: float, n_threads: int) -> None:
    """Clients that ask for all kinds of things and often leave."""
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            fields = draw.choice([{}, {"stream": True}, {"echo": True, "logprobs": 2}, {"n": 3}, {"best_of": 2}])
            body = {"prompt": "the cat" * draw.randint(1, 8), "max_tokens": draw.randint(0, 30), **fields}
            try:
                if draw.random() < 0.4:
                    with server.connect(post(body)) as left:
                        time.sleep(draw.random() * 0.05)
                        left.settimeout(0.01)
                else:
                    assert server.ask("/v1/completions", body).status in (200, 503)
            except OSError:
                pass

    in_threads(client, range(n_threads))
    server.wait_until_idle()


def test_clients_that_come_and_go(server: Running) -> None:
    load(server, 0.5, 12)
    assert server.texts(prompt="the cat", max_tokens=N_POSITIONS - 5, temperature=0)


@pytest.mark.slow
def test_64_clients_that_come_and_go(server: Running) -> None:
    """No slot is lost, and memory stays as it is."""
    import resource

    load(server, 5, 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load(server, 30, 64)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 60_000, "kilobytes"
    engine = server.server.engine
    assert (engine.n_running, engine.n_jobs, engine.n_waiting) == (0, 0, 0)
