"""The hub: revisions, gated repositories, slow mirrors, offline mode, and paths that are never asked for there.

The hub is a server of this process, and the client is the real one.
"""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2.weights.folder import locate_model
from gpt_config import GenerationConfig, ModelNotFoundError
from gpt_config.locate import Hub
from gpt_test.gpt_config.test_locate import cache_repository


class FakeHub:
    """What a request gets, and the requests that came."""

    seconds = 0.0
    status = 404
    headers: dict[str, str] = {}  # noqa: RUF012 (a test replaces it)

    def __init__(self) -> None:
        self.requests: list[str] = []


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            hub.requests.append(f"HEAD {self.path}")
            time.sleep(hub.seconds)
            self.answer(200, {})

        def do_GET(self) -> None:
            hub.requests.append(f"GET {self.path}")
            self.answer(hub.status, hub.headers)

        def answer(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield hub
    server.shutdown()
    server.server_close()


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def failing_hub(error: Exception) -> Hub:
    def download(*_: object, **__: object) -> str:
        raise error

    return Hub(download, answers=lambda: True)


def test_a_gated_repository_says_to_accept_its_terms_and_to_log_in() -> None:
    errors, response = _hub_errors()
    message = message_of(
        lambda: locate_model("owner/closed", hub=failing_hub(errors.GatedRepoError("restricted", response=response)))
    )
    assert "access to it is restricted: accept its terms on https://" in message and "/owner/closed, then log in" in message


def test_a_missing_or_private_repository_and_a_missing_revision_are_named() -> None:
    errors, response = _hub_errors()
    hub = failing_hub(errors.RepositoryNotFoundError("404", response=response))
    assert "the hub has no repository 'owner/no', or it is private: check the name, or log in" in message_of(
        lambda: locate_model("owner/no", hub=hub)
    )
    hub = failing_hub(errors.RevisionNotFoundError("404", response=response))
    assert "repository 'owner/m' has no revision 'v9': see the branches" in message_of(
        lambda: locate_model("owner/m@v9", hub=hub)
    )


def _hub_errors() -> tuple[Any, Any]:
    from types import SimpleNamespace

    from huggingface_hub import errors

    request = SimpleNamespace(url="", method="GET", headers={})
    return errors, SimpleNamespace(headers={}, request=request, status_code=401, text="", url="")


def test_the_real_client_meets_a_gated_repository(fake_hub: FakeHub) -> None:
    fake_hub.status, fake_hub.headers = 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
    message = message_of(lambda: locate_model("owner/closed"))
    assert "accept its terms" in message and "then log in" in message
    assert any(request.startswith("GET /api/models/owner/closed") for request in fake_hub.requests)


def test_a_slow_mirror_is_waited_for(fake_hub: FakeHub) -> None:
    """The hub's client waits 10 s for an answer; a server that can be reached gets as long."""
    fake_hub.seconds, fake_hub.headers = 2.5, {"X-Error-Code": "RepoNotFound"}
    assert "the hub has no repository" in message_of(lambda: locate_model("owner/model"))


def test_the_timeout_of_the_hubs_client_is_obeyed(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    fake_hub.seconds = 60.0
    began = time.perf_counter()
    message = message_of(lambda: locate_model("owner/model"))
    assert f"{constants.ENDPOINT} has not answered in 1 seconds: set HF_HUB_ETAG_TIMEOUT to more seconds" in message
    assert time.perf_counter() - began < 30


def test_the_revision_is_asked_for(fake_hub: FakeHub) -> None:
    from gpt2 import GPT2

    fake_hub.headers = {"X-Error-Code": "RepoNotFound"}
    for call in (lambda: locate_model("owner/model@v1"), lambda: GPT2.from_pretrained("owner/model", revision="v1")):
        fake_hub.requests.clear()
        assert message_of(call).startswith("'owner/model@v1' is neither a folder")
        assert any("/owner/model/revision/v1" in request for request in fake_hub.requests)


def test_offline_mode_is_named_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "(HF_HUB_OFFLINE=1 keeps the hub's client off the network: unset it)" in message_of(lambda: locate_model("o/m"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "true")
    assert "(TRANSFORMERS_OFFLINE=true keeps" in message_of(lambda: locate_model("o/m"))


@pytest.mark.parametrize("name", ["runs/model", Path("model"), Path("runs/model"), "runs/model@v1"])
def test_a_path_is_not_asked_for_on_the_hub(name: str | Path, fake_hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "it is a path, so the hub is not asked: check the path" in message_of(lambda: locate_model(name))
    assert fake_hub.requests == []


def test_a_cached_repository_is_found_beside_a_folder_of_its_owner(small_folder, tmp_path, monkeypatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    snapshot = cache_repository(constants.HF_HUB_CACHE, "someone/model", small_folder)
    assert locate_model("someone/model") == snapshot


def test_a_cached_revision_needs_no_network(small_folder: Path) -> None:
    import huggingface_hub.constants as constants

    snapshot = cache_repository(constants.HF_HUB_CACHE, "someone/model", small_folder)
    (snapshot.parents[1] / "refs" / "v1").write_text(snapshot.name)
    for name in ("someone/model@v1", f"someone/model@{snapshot.name}"):
        assert locate_model(name) == snapshot
    assert locate_model("someone/model", revision="v1") == snapshot
    message_of(lambda: locate_model("someone/model@v2"))


def test_revisions_that_cannot_be(small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpt2-tiny", str(small_folder)):
        assert "has no revisions: leave out revision='v1'" in message_of(lambda name=name: locate_model(name, revision="v1"))
        assert "has no revisions" in message_of(lambda name=name: locate_model(f"{name}@v1"))
    assert "name two revisions" in message_of(lambda: locate_model("o/m@a", revision="b"))
    assert "no revision after the @" in message_of(lambda: locate_model("o/m@"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x@y").symlink_to(small_folder)
    assert locate_model("x@y") == Path("x@y")


def test_generation_settings_of_the_hub(small_folder: Path) -> None:
    import huggingface_hub.constants as constants

    snapshot = cache_repository(constants.HF_HUB_CACHE, "someone/model", small_folder)
    (snapshot / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.5}))
    assert GenerationConfig.from_pretrained("someone/model").temperature == 0.5


def test_offline_no_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    import huggingface_hub.constants

    asked: list[object] = []

    def look_up(*arguments: object, **_: object) -> list[object]:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message_of(lambda: locate_model("someone/model"))
    assert not asked
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    message_of(lambda: locate_model("someone/model"))
    assert asked
