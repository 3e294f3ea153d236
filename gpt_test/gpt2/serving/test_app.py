"""Paths, errors in OpenAI's shape, and who may call."""

from __future__ import annotations

import base64
import json
import logging
import struct
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.inspection.overviews import overview
from gpt2.inspection.page import html_page
from gpt2.serving.gate import Access, access_log
from gpt2.serving.models import Served
from gpt_test.gpt2.serving.running import DAMAGED, N_POSITIONS, Answer, Running, in_threads, running, wait_until

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"suffix": "x"}, "suffix", "unsupported"),
    ({"max_new_tokens": 5}, "max_new_tokens", "unsupported"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({"max_tokens": True}, "max_tokens", "invalid_type"),
    ({"max_tokens": N_POSITIONS}, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": 10**6}, "max_tokens", "context_length_exceeded"),
    ({"prompt": [1] * (N_POSITIONS + 1), "max_tokens": 0}, "prompt", "context_length_exceeded"),
    ({"prompt": "x" * 100_000}, "prompt", "context_length_exceeded"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[1], "a"]}, "prompt", "invalid_type"),
    ({"prompt": [True]}, "prompt", "invalid_type"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
    ({"prompt": [300]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": [[10**400]]}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 1025}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 100, "n": 100}, "prompt", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"top_p": -0.1}, "top_p", "invalid_value"),
    ({"min_p": 2}, "min_p", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": 3, "best_of": 2}, "best_of", "invalid_value"),
    ({"n": 1, "best_of": 2, "stream": True}, "best_of", "invalid_value"),
    ({"logprobs": 21}, "logprobs", "invalid_value"),
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"prompt": [[1] * 20] * 1024, "logprobs": 20, "max_tokens": 77, "echo": True, "n": 1}, "logprobs", "invalid_value"),
    ({"echo": 1}, "echo", "invalid_type"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"stop": ["a" * 257]}, "stop", "invalid_value"),
    ({"stop": [1]}, "stop", "invalid_type"),
    ({"seed": -1}, "seed", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"300": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", "invalid_value"),
    ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"min_tokens": 17}, "min_tokens", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    ({"model": 5}, "model", "invalid_type"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "code"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named(server: Running, fields: dict[str, Any], param: str, code: str) -> None:
    answer = server.ask("/v1/completions", {"prompt": "the cat", **fields})
    assert answer.status == 400
    error = answer.error
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert error["message"].isprintable() and len(error["message"]) < 300


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": "small"}, "model", "no_chat_template"),
        ({"messages": []}, "messages", "invalid_type"),
        ({"messages": ["a"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"role": "cat", "content": "a"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": "a" * 500}]}, "messages", "context_length_exceeded"),
        ({"tools": [{}]}, "tools", "unsupported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_chat_is_named(server: Running, fields: dict[str, Any], param: str, code: str) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "the cat"}], **fields}
    answer = server.ask("/v1/chat/completions", body)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, code)
    if code == "no_chat_template":
        assert "/v1/completions" in answer.error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'"a"', b"\xff", b'{"prompt": NaN}', b"[" * 100_000, 
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: str(content[:20]),
)  # fmt: skip
def test_a_body_that_is_no_object(server: Running, content: bytes) -> None:
    answer = server.ask("/v1/completions", content)
    assert (answer.status, answer.error["code"]) == (400, "invalid_json")


def test_other_errors(server: Running) -> None:
    for path, body, status, code in (
        ("/v1/nothing", None, 404, "path_not_found"),
        ("/v1/completions/", {}, 404, "path_not_found"),
        ("/v1/completions", None, 405, "method_not_allowed"),
        ("/health", {}, 405, "method_not_allowed"),
        ("/v1/models/nothing", None, 404, "model_not_found"),
        ("/v1/completions", {"model": "nothing\ud800"}, 404, "model_not_found"),
        ("/v1/completions", {"model": "broken"}, 500, "model_not_loaded"),
        ("/v1/completions", b" " * (4 * 2**20 + 1), 413, "body_too_large"),
    ):
        answer = server.ask(path, body)
        assert (answer.status, answer.error["code"]) == (status, code), path
    assert server.ask("/v1/completions").headers["allow"] == "POST"


def test_a_body_that_is_too_large_is_refused_without_a_length(server: Running) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connect(head) as client:
        part = b"100000\r\n" + b" " * 2**20 + b"\r\n"
        try:
            for _ in range(5):
                client.sendall(part)
        except OSError:  # it has answered and closed
            pass
        assert client.recv(12) == b"HTTP/1.1 413"


def test_models(server: Running, served: Mapping[str, Served]) -> None:
    listed = server.ask("/v1/models").json
    assert [model["id"] for model in listed["data"]] == [*served, "broken"] and listed["object"] == "list"
    assert server.ask("/v1/models/chat").json == listed["data"][1]


def test_tokenize_and_back(server: Running, served: Mapping[str, Served]) -> None:
    tokenizer, text = served["small"].tokenizer, "the cat 🦙<|endoftext|>"
    for special in (True, False):
        ids = tokenizer.encode(text, allowed_special="all" if special else ())
        answer = server.ask("/tokenize", {"prompt": text, "special_tokens": special}).json
        assert answer == {"tokens": ids, "count": len(ids), "max_model_len": N_POSITIONS}
        assert server.ask("/detokenize", {"tokens": ids}).json == {"prompt": text}
    assert server.ask("/tokenize", {}).error["param"] == "prompt"
    assert server.ask("/detokenize", {"tokens": [300]}).error["param"] == "tokens"
    assert server.ask("/detokenize", {"tokens": "a"}).error["code"] == "invalid_type"
    info = server.ask("/tokenizer_info?model=chat").json
    assert info["eos_token"] == "<|endoftext|>" and "assistant" in info["chat_template"]
    assert server.ask("/tokenizer_info").json["chat_template"] is None


def test_embeddings(server: Running, served: Mapping[str, Served]) -> None:
    """The mean of the hidden states, of length 1, whatever the parts in which a text is computed."""
    one, texts = served["small"], ["the cat", "a", "the small cat and the old dog by the sea"]
    answer = server.ask("/v1/embeddings", {"input": texts}).json
    for text, found in zip(texts, answer["data"], strict=True):
        with torch.inference_mode():
            mean = one.model.hidden_states(torch.tensor([one.tokenizer.encode(text)]))[0].mean(0)
        assert found["embedding"] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    packed = server.ask("/v1/embeddings", {"input": texts[0], "encoding_format": "base64"}).json["data"][0]["embedding"]
    assert struct.unpack("<24f", base64.b64decode(packed)) == pytest.approx(answer["data"][0]["embedding"])
    assert server.ask("/v1/embeddings", {"input": "a", "dimensions": 2}).error["code"] == "unsupported"
    assert server.ask("/v1/embeddings", {}).error["param"] == "input"
    assert server.ask("/v1/embeddings", {"input": "a", "encoding_format": "x"}).error["param"] == "encoding_format"


def test_health_metrics_and_page(server: Running) -> None:
    assert server.ask("/health").json == {"status": "ready"}
    before = server.n_generated()
    server.complete(prompt="a", max_tokens=7, ignore_eos=True)
    wait_until(lambda: server.n_generated() == before + 7)
    page = server.ask("/")
    assert page.status == 200 and "<title>" in page.content.decode()


def test_the_page_about_a_text(server: Running, served: Mapping[str, Served]) -> None:
    """It is that of `gpt2 inspect`, and changes no text that is generated at the same time."""
    one = served["small"]
    page = server.ask("/inspect?text=the+cat&model=small")
    shown = overview(one.model, "the cat", tokenizer=one.tokenizer, name="small")
    assert page.status == 200 and page.content.decode() == html_page(shown)
    alone = server.texts(prompt="the dog", max_tokens=60, temperature=0, ignore_eos=True)
    found: list[list[str]] = []

    def ask(number: int) -> None:
        if number:
            assert server.ask("/inspect?text=the+cat").status == 200
        else:
            found.extend(server.texts(prompt="the dog", max_tokens=60, temperature=0, ignore_eos=True) for _ in range(4))

    in_threads(ask, range(4))
    assert found == [alone] * 4
    wait_until(lambda: not any(thread.name.startswith("gpt2-once") for thread in threading.enumerate()))
    assert server.ask("/inspect?text=the+cat&model=coarse").status == 200  # in bfloat16
    for query in ("", "?text=", "?text=" + "a+" * 200, "?text=a&model=unknown"):
        assert server.ask("/inspect" + query).error["param"] in ("text", "model")


def test_an_exception_in_a_step_ends_only_its_row(server: Running) -> None:
    """NaN in one row of three: an event with the error for this client, and the texts of the others unchanged."""
    fields = {"model": "damaged", "max_tokens": 40, "ignore_eos": True}
    prompts = ["cat", [65] * (DAMAGED - 9), "dog"]
    alone = [server.texts(prompt=prompt, seed=1, **fields) for prompt in ("cat", "dog")]
    found: dict[int, Answer] = {}

    def ask(number: int) -> None:
        body = {"prompt": prompts[number], "seed": 1, "stream": True, **fields}
        found[number] = server.ask("/v1/completions", body)

    in_threads(ask, range(3))
    for number, texts in ((0, alone[0]), (2, alone[1])):
        assert ["".join(event["choices"][0]["text"] for event in found[number].events[:-1])] == texts
    *before, error = found[1].events
    assert error["error"]["code"] == "generation_failed" and "NaN" in error["error"]["message"]
    assert before and all("choices" in event for event in before)
    body = {"model": "damaged", "prompt": [65] * (DAMAGED + 1), "echo": True, "logprobs": 1}
    whole = server.ask("/v1/completions", body)
    assert (whole.status, whole.error["code"]) == (500, "generation_failed")
    server.wait_until_idle()


@pytest.fixture(scope="module")
def locked(served: Mapping[str, Served]) -> Iterator[Running]:
    access = Access(api_key="sécret", hosts=["gpt2.example.org"], log="json")
    with running({"small": served["small"]}, access=access) as found:
        yield found


def test_a_key_is_needed(locked: Running, caplog: pytest.LogCaptureFixture) -> None:
    right = {"Authorization": "Bearer sécret".encode().decode("latin-1")}
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer secret"}, {"Authorization": "Basic x"}):
        answer = locked.ask("/v1/completions", {"prompt": "a"}, headers=headers)
        assert (answer.status, answer.error["type"]) == (401, "authentication_error")
        assert answer.headers["www-authenticate"] == "Bearer"
    with caplog.at_level(logging.INFO, logger=access_log.name):
        access_log.propagate = True
        assert locked.ask("/v1/completions", {"prompt": "a", "max_tokens": 3}, headers=right).status == 200
        wait_until(lambda: any('"status": 200' in record.getMessage() for record in caplog.records))
    line = next(json.loads(record.getMessage()) for record in caplog.records if '"status": 200' in record.getMessage())
    assert (line["path"], line["status"], line["prompt_tokens"]) == ("/v1/completions", 200, 1)
    assert "cret" not in json.dumps(line)
    assert locked.ask("/health").status == 200 and locked.ask("/").status == 200
    assert locked.ask("/metrics").status == 401


def test_host_and_origin(locked: Running) -> None:
    for host, status in (
        ("gpt2.example.org", 200), ("127.0.0.1:1", 200), ("[::1]", 200), ("a.localhost:80", 200),
        ("evil.com", 400), ("evil.com:80", 400), ("127.0.0.1.evil.com", 400), ("", 400), ("localhost:x", 400),
    ):  # fmt: skip
        assert locked.ask("/health", headers={"Host": host}).status == status, host
    mine = f"127.0.0.1:{locked.port}"
    for origin, status in ((f"http://{mine}", 200), ("http://evil.com", 403), ("null", 403)):
        answer = locked.ask("/health", headers={"Host": mine, "Origin": origin})
        assert answer.status == status, origin
        assert "access-control-allow-origin" not in answer.headers


def test_no_other_page_shows_ours_in_a_frame(locked: Running) -> None:
    """The headers are in answers of every kind, also in those of errors."""
    for path in ("/", "/health", "/inspect?text=the", "/nothing"):
        headers = locked.ask(path).headers
        assert headers["content-security-policy"] == "frame-ancestors 'none'", path
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"


NAMES = sorted({name for fields, _, _ in WRONG for name in fields} | {"model", "prompt", "user", "messages"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(0, 40) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["small", "chat", "damaged", "the cat", "\ud800", "<|endoftext|>"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=4) | st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)
PATHS = st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/embeddings"])


def check_no_body_is_a_failure(server: Running, path: str, body: dict[str, Any]) -> None:
    if body.get("model") not in (None, "chat"):
        body = {**body, "model": "small"}
    answer = server.ask(path, json.dumps(body, allow_nan=True).encode())
    assert answer.status in (200, 400, 404), (answer.status, answer.content)
    if answer.status != 200:
        assert answer.error["message"]
    elif body.get("stream") is True and "completions" in path:
        assert answer.events[-1] == "[DONE]"


@settings(max_examples=60)
@given(PATHS, BODIES)
def test_no_body_gives_500(server: Running, path: str, body: dict[str, Any]) -> None:
    check_no_body_is_a_failure(server, path, body)


@pytest.mark.slow
@settings(max_examples=2000)
@given(PATHS, BODIES)
def test_no_body_gives_500_in_many(server: Running, path: str, body: dict[str, Any]) -> None:
    check_no_body_is_a_failure(server, path, body)
