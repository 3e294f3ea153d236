"""The playground in a real browser. A stand-in server answers with fixed streams, so that nothing depends on a model."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gpt2.inspection.colours import DARK, LIGHT, surprisal_level
from gpt2.serving.playground import playground_page
from gpt_test.browser import as_rgb, errors_of, requested_by, text_of, visit
from gpt_test.offline_site import loads_from_elsewhere

Event = dict[str, Any]
KEY = "open sesame"
HOSTILE = "</script><img src=x onerror=alert(1)>"
SMILE = [r"bytes:\x20\xf0\x9f", r"bytes:\x98", r"bytes:\x80"]  # " 😀" in three tokens


def event_of(
    names: Sequence[str], bits: Sequence[float], *others: str, text: str | None = None, finish: str | None = None
) -> Event:
    """An event of the stream as OpenAI sends it: tokens with their surprisal, and further alternatives of each."""
    log_probs = [-one * math.log(2) for one in bits]
    further = {other: -9.0 - i for i, other in enumerate(others)}
    tops = [{name: one, **further} for name, one in zip(names, log_probs, strict=True)]
    logprobs = {"tokens": list(names), "token_logprobs": log_probs, "top_logprobs": tops, "text_offset": [0] * len(names)}
    shown = "".join(names) if text is None else text
    choice = {"index": 0, "text": shown, "logprobs": logprobs, "finish_reason": finish}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny", "choices": [choice]}


TEXT = [
    event_of([", there"], [0.5], " in", *(f" other{i}" for i in range(8))),
    event_of([" was", " a"], [2, 5], " is"),
    event_of([".\n"], [20], " cat", HOSTILE, finish="length"),
]


class StandIn(ThreadingHTTPServer):
    """Serves the page, two models and what `answer` returns for a request: events, or a status with an error's message."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}/"
        self.reset()

    def reset(self) -> None:
        self.answer: Callable[[dict[str, Any]], list[Event] | tuple[int, str]] = lambda body: TEXT
        self.bodies: list[dict[str, Any]] = []
        self.needs_key = False
        self.go_on = threading.Event()  # an event {"wait": true} holds the stream until then
        self.has_left = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        if self.path == "/":
            self.send("text/html; charset=utf-8", playground_page())
        elif self.path == "/v1/models" and self.is_allowed():
            models = [{"id": name, "object": "model", "created": 1, "owned_by": "me"} for name in ("tiny", "other")]
            self.send("application/json", json.dumps({"object": "list", "data": models}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions" and self.headers["Content-Type"] == "application/json"
        if not self.is_allowed():
            return
        self.server.bodies.append(body)
        answer = self.server.answer(body)
        if isinstance(answer, tuple):
            self.fail(*answer)
        else:
            self.stream(answer)

    def is_allowed(self) -> bool:
        allowed = not self.server.needs_key or self.headers["Authorization"] == f"Bearer {KEY}"
        if not allowed:
            self.fail(401, "the API key is wrong")
        return allowed

    def fail(self, status: int, message: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self.send("application/json", json.dumps({"error": error}), status)

    def send(self, kind: str, text: str, status: int = 200) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def stream(self, events: list[Event]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in events:
            if "wait" in event:
                self.server.go_on.wait(120)
                self.notice_who_leaves()
            else:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        if not events or "error" not in events[-1]:
            self.wfile.write(b"data: [DONE]\n\n")

    def notice_who_leaves(self) -> None:
        self.connection.settimeout(60)
        if self.connection.recv(1) == b"":
            self.server.has_left.set()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def running() -> Iterator[StandIn]:
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running: StandIn) -> StandIn:
    running.reset()
    return running


def until(browser: Any, condition: Callable[[Any], object]) -> Any:
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 60, poll_frequency=0.03).until(condition)


def opened(browser: Any, server: StandIn, **screen: Any) -> None:
    visit(browser, server.address, **screen)
    until(browser, lambda _: browser.find_elements("css selector", "#a [name=model] option") or text_of(browser, "#error"))


def ended(browser: Any, column: str = "a") -> str:
    """The line below a text that has ended."""
    return until(browser, lambda _: (line := text_of(browser, f"#{column} .status")) != "generating …" and line)


def generated(browser: Any) -> str:
    browser.find_element("id", "generate").click()
    return ended(browser)


def point_at(browser: Any, selector: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(browser.find_element("css selector", selector)).perform()


def alternatives(browser: Any, column: str = "a") -> list[str]:
    """The alternatives that are shown."""
    buttons = browser.find_elements("css selector", f"#{column} .alternatives:not([hidden]) button")
    return [button.get_attribute("data-name") for button in buttons]


def keys(browser: Any, *pressed: str) -> None:
    browser.switch_to.active_element.send_keys(*pressed)


def set_field(browser: Any, selector: str, value: str) -> None:
    field = browser.find_element("css selector", selector)
    field.clear()
    field.send_keys(value)


def test_the_page_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    page = playground_page()
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert not list(loads_from_elsewhere(tmp_path))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert page.count("</script>") == 1 and "innerHTML" not in page


def test_a_text_streams_in_and_is_coloured(browser: Any, server: StandIn) -> None:
    server.answer = lambda body: [*TEXT[:2], {"wait": True}, *TEXT[2:]]
    opened(browser, server)
    browser.find_element("id", "generate").click()
    until(browser, lambda _: text_of(browser, "#a .tokens") == ", there was a")
    assert text_of(browser, "#a .status") == "generating …"
    browser.find_element("id", "stop").click()
    assert ended(browser).endswith("stopped") and not browser.find_element("id", "stop").is_enabled()
    server.go_on.set()
    assert server.has_left.wait(60), "the page did not leave the stream"

    server.answer = lambda body: TEXT
    browser.find_element("css selector", "#a .again").click()
    until(browser, lambda _: text_of(browser, "#a .text") == "Once upon a time, there was a.\n")
    tokens = browser.find_elements("css selector", "#a .tokens .token")
    levels = [f"token s{surprisal_level(bits)}" for bits in (0.5, 2, 5, 20)]
    assert [token.get_attribute("class") for token in tokens] == levels
    first, second = server.bodies
    assert ended(browser) == f"4 tokens · 6.88 bits per token · seed {second['seed']} · max_tokens reached"
    assert first.pop("seed") != second.pop("seed")
    assert first == second == {
        "model": "tiny", "prompt": "Once upon a time", "max_tokens": 64, "temperature": 0.8, "stream": True, "logprobs": 10,
        "echo": False,
    }  # fmt: skip
    assert text_of(browser, "#a .command") == (
        "gpt2 inspect --from_pretrained tiny --html page.html -- 'Once upon a time, there was a.\n'"
    )
    link = browser.find_element("css selector", "#a .page").get_attribute("href")
    assert link == f"{server.address}inspect?model=tiny&text=Once+upon+a+time%2C+there+was+a.%0A"
    assert not errors_of(browser)
    assert requested_by(browser) == {server.address + path for path in ("", "v1/models", "v1/completions")}


def test_a_click_on_an_alternative_continues_from_there(browser: Any, server: StandIn) -> None:
    opened(browser, server)
    set_field(browser, "#prompt", f"It's {HOSTILE}")
    set_field(browser, "#a [name=stop]", "\\n\\n\nEnd")
    generated(browser)
    assert not alternatives(browser)
    point_at(browser, "#a0")
    assert alternatives(browser) == [", there", " in", *(f" other{i}" for i in range(8))]
    assert text_of(browser, "#a .alternatives .note") == "“, there”: 0.5 bits"
    assert text_of(browser, "#a .alternatives .percent") == "71%"
    point_at(browser, "h1")
    assert not alternatives(browser)

    # The list is reachable with the pointer: it begins where the token ends.
    point_at(browser, "#a2")
    token, shown = browser.find_element("id", "a2").rect, browser.find_element("css selector", "#a .alternatives").rect
    assert shown["x"] <= token["x"] < shown["x"] + shown["width"]
    assert shown["y"] == pytest.approx(token["y"] + token["height"], abs=1.5)
    point_at(browser, "#a3")
    assert set(alternatives(browser)) == {".\n", " cat", HOSTILE}
    server.answer = lambda body: [event_of([" sat", "<|endoftext|>"], [1, 2], text=" sat", finish="stop")]
    point_at(browser, f"#a .alternatives [data-name='{HOSTILE}']")
    browser.find_element("css selector", f"#a .alternatives [data-name='{HOSTILE}']").click()
    assert ended(browser).startswith("6 tokens") and not alternatives(browser)
    assert server.bodies[-1]["prompt"] == f"It's {HOSTILE}, there was a{HOSTILE}"
    assert server.bodies[-1]["stop"] == ["\n\n", "End"]
    assert text_of(browser, "#a .text") == f"It's {HOSTILE}, there was a{HOSTILE} sat<|endoftext|>"
    classes = [set(browser.find_element("id", f"a{i}").get_attribute("class").split()) for i in (3, 4, 5)]
    assert classes == [{"token", "s4", "taken", "at", "chosen"}, {"token", "s0"}, {"token", "s1", "cut"}]
    quoted = f"It's {HOSTILE}, there was a{HOSTILE} sat".replace("'", "'\\''")
    assert text_of(browser, "#a .command").endswith(f" -- '{quoted}'")
    assert not browser.find_elements("tag name", "img") and not errors_of(browser)
    point_at(browser, "#a4")
    assert alternatives(browser) == [" sat"]

    # Regenerate draws again what follows the alternative.
    browser.find_element("css selector", "#a .again").click()
    until(browser, lambda _: len(server.bodies) == 3)
    assert server.bodies[2]["prompt"] == server.bodies[1]["prompt"] and server.bodies[2]["seed"] != server.bodies[1]["seed"]
    assert ended(browser).startswith("6 tokens")


def test_everything_works_with_keys(browser: Any, server: StandIn) -> None:
    from selenium.webdriver import Keys

    opened(browser, server)
    assert browser.switch_to.active_element.get_attribute("id") == "prompt"
    keys(browser, Keys.CONTROL, Keys.ENTER)
    ended(browser)
    browser.execute_script("document.querySelector('#a [name=stop]').focus()")
    keys(browser, Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("class") == "tokens"
    assert alternatives(browser)[0] == ", there"
    keys(browser, Keys.END)
    assert browser.find_element("id", "a3").get_attribute("aria-selected") == "true"
    keys(browser, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert alternatives(browser) == [" was", " is"]
    keys(browser, Keys.ARROW_DOWN)
    keys(browser, Keys.ESCAPE)
    assert browser.switch_to.active_element.get_attribute("class") == "tokens"
    keys(browser, Keys.ENTER)
    keys(browser, Keys.ARROW_DOWN)
    keys(browser, Keys.ENTER)
    until(browser, lambda _: len(server.bodies) == 2)
    assert server.bodies[1]["prompt"] == "Once upon a time, there is"
    ended(browser)
    server.answer = lambda body: [TEXT[0], {"wait": True}]
    keys(browser, Keys.CONTROL, Keys.ENTER)
    until(browser, lambda _: text_of(browser, "#a .tokens") == ", there")
    keys(browser, Keys.ESCAPE)
    assert ended(browser).endswith("stopped") and not alternatives(browser)
    server.go_on.set()


def test_parts_of_characters(browser: Any, server: StandIn) -> None:
    part = r"bytes:\xff"
    server.answer = lambda body: [event_of(SMILE[:2], [9, 1], text=""), event_of([SMILE[2], "!"], [0, 3], part, text=" 😀!")]
    opened(browser, server)
    generated(browser)
    assert text_of(browser, "#a .tokens") == "".join(SMILE) + "!"
    whole = [browser.find_element("id", f"a{i}").get_attribute("data-whole") for i in range(4)]
    assert whole == [None, None, " 😀", None]
    assert text_of(browser, "#a .command").endswith("'Once upon a time 😀!'")
    point_at(browser, "#a3")
    button = browser.find_element("css selector", "#a .alternatives button:last-child")
    assert button.text.startswith(part) and not button.is_enabled()
    browser.find_element("css selector", "#a .alternatives [data-name='!']").click()
    until(browser, lambda _: len(server.bodies) == 2)
    assert server.bodies[1]["prompt"] == "Once upon a time 😀!"
    ended(browser)


def test_two_settings_side_by_side(browser: Any, server: StandIn) -> None:
    server.answer = lambda body: [event_of([f" {body['model']}"], [1], finish="stop")]
    opened(browser, server)
    set_field(browser, "#a [name=top_k]", "7")
    browser.find_element("id", "beside").click()
    set_field(browser, "#b [name=temperature]", "0")
    browser.find_element("css selector", "#b [name=model] [value=other]").click()
    generated(browser)
    ended(browser, "b")
    assert [text_of(browser, f"#{column} .tokens") for column in "ab"] == [" tiny", " other"]
    one, other = sorted(server.bodies, key=lambda body: body["model"] != "tiny")
    assert other == {**one, "model": "other", "temperature": 0} and one["top_k"] == 7
    left, right = (browser.find_element("id", column).rect for column in "ab")
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    point_at(browser, "#b0")
    assert alternatives(browser, "b") == [" other"] and not alternatives(browser, "a")
    browser.find_element("id", "beside").click()
    generated(browser)
    assert len(server.bodies) == 3


def test_errors_are_shown_in_a_line(browser: Any, server: StandIn) -> None:
    server.needs_key = True
    opened(browser, server)
    assert text_of(browser, "#error") == "the API key is wrong"
    set_field(browser, "#key", f"{KEY}\n")
    until(browser, lambda _: not text_of(browser, "#error"))
    for answer, shown, n_tokens in [
        ((400, f"temperature is 9: at most 2 {HOSTILE}"), f"temperature is 9: at most 2 {HOSTILE}", 0),
        ([TEXT[0], {"error": {"message": "the model has gone"}}], "the model has gone", 1),
    ]:
        server.answer = lambda body, answer=answer: answer
        assert generated(browser).startswith(f"{n_tokens} token")
        assert text_of(browser, "#a .error") == shown
    server.answer = lambda body: TEXT
    generated(browser)
    assert text_of(browser, "#a .error") == "" and text_of(browser, "#a .tokens")


@pytest.mark.parametrize(("dark", "width"), [(True, 360), (False, 1200)], ids=["dark phone", "light"])
def test_it_fits_a_phone_and_has_a_dark_style(browser: Any, server: StandIn, dark: bool, width: int) -> None:
    server.answer = lambda body: [event_of(["w" * 200, " a"], [1, 7], "x" * 300)]
    opened(browser, server, dark=dark, width=width)
    set_field(browser, "#prompt", "p" * 100)
    browser.find_element("id", "beside").click()
    generated(browser)
    browser.find_element("css selector", "#a summary").click()
    browser.find_element("id", "a1").click()
    assert alternatives(browser) == [" a", "x" * 300]
    wide, background = browser.execute_script(
        "return [document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
    )
    assert wide <= width
    assert background == as_rgb((DARK if dark else LIGHT)["page"])
