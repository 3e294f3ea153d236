"""gpt2 serve as a command: the line when it is ready, signals, and wrong options. `gpt_test/gpt2/serving` tests the rest."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="starlette is not installed (pip install -r requirements-dev.txt)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install -r requirements-dev.txt)")
pytest.importorskip("prometheus_client", reason="prometheus_client is not installed (pip install -r requirements-dev.txt)")

from gpt2.cli.serve import template_of
from gpt2.finetuning.template import InstructionTemplate
from gpt2.pretrained import load_model
from gpt_encoder import GPT2Tokenizer

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def serving(*options: object) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server in a process of its own: the process, its address, and its first line."""
    command = [sys.executable, "-m", "gpt2", "serve", "--port", "0", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            address = re.search(r"http://[^ ]+", line)
            assert address is not None, line + process.stderr.read()
            yield process, address[0], line
        finally:
            process.kill()


def test_a_server_says_where_it_is_and_ends_at_a_signal(small_folder: Path) -> None:
    with serving("--from_pretrained", small_folder, "--log", "json", "--slots", 3) as (process, address, line):
        assert re.fullmatch(
            rf"{small_folder} is ready at http://127\.0\.0\.1:\d+ \(3 slots, 0\.015 MB each when full\)\n", line
        )
        body = json.dumps({"prompt": "the cat", "max_tokens": 3, "temperature": 0}).encode()
        with urllib.request.urlopen(f"{address}/v1/completions", body, timeout=300) as answer:
            assert json.load(answer)["model"] == str(small_folder)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read() == ""
        [logged] = process.stderr.read().splitlines()
        assert json.loads(logged)["new_tokens"] == 3


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(small_folder: Path) -> None:
    """There is work for many seconds, and the grace is ten minutes."""
    body = json.dumps({"prompt": "a", "n": 128, "max_tokens": 39, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with serving("--from_pretrained", small_folder, "--grace", 600) as (process, address, _), ExitStack() as stack:
        host, port = address.removeprefix("http://").split(":")
        for _ in range(50):
            stack.enter_context(socket.create_connection((host, int(port)))).sendall(head + body)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--host", "0.0.0.0"], 2, "--host=0.0.0.0 lets other machines in: set GPT2_SERVE_API_KEY, or add --no_auth"),
        (["--api_key", " "], 2, "--api_key is empty: give a key"),
        (["--grace", "nan"], 2, "--grace"),
        (["--slots", 0], 2, "--slots"),
        (["--log", "xml"], 2, "--log"),
        (["--host", "no.such.host.invalid", "--no_auth"], 1, "is not an address of this machine"),
        (["--from_pretrained", "/nothing/here"], 1, "/nothing/here"),
        (["--draft_model", "/nothing/here"], 1, "/nothing/here"),
        (["--draft_model", "gpt2-tiny", "--port", 0], 1, "use a draft model of the same vocabulary"),
    ],
)  # fmt: skip
def test_wrong_options(run_command, small_folder: Path, options: list[object], status: int, message: str) -> None:
    result = run_command("serve", "--from_pretrained", small_folder, *options)
    assert result.status == status and message in result.err and result.err.count("\n") == 1 and not result.out


def test_a_port_that_is_taken(run_command, small_folder: Path) -> None:
    from gpt2.serving.server import bound_socket

    with bound_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        result = run_command("serve", "--from_pretrained", small_folder, "--port", port)
    assert result.status == 1 and f"port={port} on 127.0.0.1 cannot be used" in result.err


def test_a_folder_that_cannot_be_loaded_ends_the_command(run_command, small_folder: Path, tmp_path: Path) -> None:
    """It has the files of a model, so it is found, and no weights can be read."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in small_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes() if file.suffix != ".safetensors" else b"x" * 100)
    result = run_command("serve", "--from_pretrained", folder, "--port", 0)
    assert result.status == 1 and result.err.startswith("error: ") and result.err.count("\n") == 1


def test_the_packages_are_an_extra(run_command, small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = run_command("serve", "--from_pretrained", small_folder)
    assert result.status == 1 and "pip install '.[serve]'" in result.err


def test_the_template_of_a_folder(small_folder: Path, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """A chat has the prompt that the model was taught with."""
    assert template_of(load_model(small_folder, device="cpu", dtype="float32")) is None
    folder = tmp_path / "taught"
    load_model(small_folder, device="cpu", dtype="float32").save_pretrained(folder, tokenizer=small_tokenizer)
    template = InstructionTemplate(instruction="Q: {instruction}\n", response="A:")
    template.save(folder)
    for name in ("instruction_template.json", "chat_template.jinja"):
        found = template_of(load_model(folder, device="cpu", dtype="float32"))
        assert found is not None
        ids = found.ids([{"role": "user", "content": "the cat"}], small_tokenizer)
        assert small_tokenizer.decode(ids) == template.prompt("the cat")
        (folder / name).unlink()
