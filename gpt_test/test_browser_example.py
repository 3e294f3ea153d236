"""examples/browser: the page generates the ids of this package in headless Chromium, without any other host. Slow."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gpt2 import GPT2
from gpt2.formats.export import export_model
from gpt2.formats.onnx import Engine
from gpt_encoder import load_tokenizer

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "browser"


class Site(NamedTuple):
    """A folder that is served, and where."""

    folder: Path
    address: str


class Handler(SimpleHTTPRequestHandler):
    """Serves the folder and writes no lines."""

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The example, built by its npm command beside the two models, and its address."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("this system has no npm (apt-get install npm)")
    folder = tmp_path_factory.mktemp("site") / "browser"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules", "models"))
    command = [npm, "install", "--ignore-scripts", "--no-package-lock"]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        pytest.skip("this system cannot reach npm's registry")
    model, tokenizer = GPT2.from_pretrained("gpt2-tiny"), load_tokenizer("gpt2-tiny")
    export_model(model, tokenizer, folder / "models" / "gpt2-tiny", to="onnx")
    export_model(model, tokenizer, folder / "models" / "in-int8", to="onnx", dtype="int8")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Site(folder, f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()


def wait_for(browser: Any, state: str, seconds: int = 120) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    def is_there(driver: Any) -> bool:
        text = driver.find_element("id", "state").text
        assert not text.startswith("Error"), (text, driver.get_log("browser"))
        return text.startswith(state)

    WebDriverWait(browser, seconds, poll_frequency=0.2).until(is_there)


def test_the_page_streams_the_greedy_ids_of_this_package(browser: Any, site: Site) -> None:
    model, tokenizer = GPT2.from_pretrained("gpt2-tiny"), load_tokenizer("gpt2-tiny")
    prompt = torch.tensor([tokenizer.encode("Once upon a time")])
    ids, text, lengths = generated(browser, site.address)
    assert ids == model.generate(prompt, max_new_tokens=40, stop_at_eot=False)[0].tolist()
    assert text == tokenizer.decode(ids)
    assert len({*lengths}) > 10 and sorted(lengths) == lengths  # it grows while the model computes
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 5 and all(url.startswith((site.address, "data:", f"blob:{site.address}")) for url in urls), urls


def test_the_page_runs_the_int8_file(browser: Any, site: Site) -> None:
    """A browser rounds in other places than onnxruntime here, so that tokens with nearly the same logit may be exchanged."""
    ids, text, _ = generated(browser, f"{site.address}?model=in-int8&dtype=q8")
    log_probs = Engine(site.folder / "models" / "in-int8").logits(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    chosen = log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert float((log_probs.amax(-1) - chosen)[-40:].max()) < 0.3
    assert text == load_tokenizer("gpt2-tiny").decode(ids) and len(ids) > 40
    assert "With rounded weights, the ids may differ" in browser.find_element("id", "state").text


def generated(browser: Any, address: str) -> tuple[list[int], str, list[int]]:
    """The ids and the text of the page after a click, and the lengths of the text at each change."""
    browser.get(address)
    wait_for(browser, "Ready.")
    browser.execute_script(
        "window.lengths = []; new MutationObserver(() => lengths.push(document.querySelector('output').textContent.length))"
        ".observe(document.querySelector('output'), {childList: true, characterData: true, subtree: true})"
    )
    browser.find_element("css selector", "button").click()
    wait_for(browser, "Ready.")
    output = browser.find_element("css selector", "output")
    ids = [int(token_id) for token_id in output.get_attribute("data-ids").split()]
    return ids, browser.execute_script("return arguments[0].textContent", output), browser.execute_script("return lengths")
