"""The overview of a text, its page as text, and the page in a real browser."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2 import GPT2
from gpt2.inspection import Overview, ablate_heads, html_page, intervene, overview, trace
from gpt2.inspection.colours import DARK, LIGHT
from gpt_config import GPT2Config
from gpt_config.errors import InputError
from gpt_encoder import GPT2Tokenizer
from gpt_test.browser import as_rgb, errors_of, requested_by, text_of, visit
from gpt_test.conftest import random_model
from gpt_test.offline_site import loads_from_elsewhere

HOSTILE = "the cat </script><img src=x onerror=alert(1)> $title\n the cat"


@pytest.fixture(scope="module")
def model(small_tokenizer: GPT2Tokenizer) -> GPT2:
    config = GPT2Config(
        vocab_size=small_tokenizer.vocab_size, n_positions=140, n_embd=24, n_layer=2, n_head=3,
        bos_token_id=small_tokenizer.eot_token_id, eos_token_id=small_tokenizer.eot_token_id,
    )  # fmt: skip
    return random_model(config, positions=0.5)


@pytest.fixture(scope="module")
def shown(model: GPT2, small_tokenizer: GPT2Tokenizer) -> Overview:
    ids = small_tokenizer.encode(HOSTILE)
    others = [*ids]
    others[1] = small_tokenizer.encode(" dog")[0]
    return overview(model, ids, tokenizer=small_tokenizer, attribute=True, patch_from=others, name="a <model>")


def data_of(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


# ---- The overview ----------------------------------------------------------------------------------------------------


def test_an_overview_has_the_models_own_figures(model: GPT2, shown: Overview, small_tokenizer: GPT2Tokenizer) -> None:
    ids = torch.tensor([shown.ids])
    log_probs = model(ids)[0].log_softmax(-1)
    expected = -log_probs[torch.arange(len(shown.ids) - 1), ids[0, 1:]] / torch.tensor(2.0).log()
    assert shown.bits[0] is None and shown.bits[1:] == pytest.approx(expected.tolist(), abs=1e-4)
    assert shown.loss == pytest.approx(torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item(), abs=1e-5)
    best = [guesses[0] for guesses in shown.guesses]
    assert [one.id for one in best] == log_probs.argmax(-1).tolist()
    assert [one.probability for one in best] == pytest.approx(log_probs.exp().amax(-1).tolist(), abs=1e-5)
    assert best[0].label == small_tokenizer.decode([best[0].id])
    assert torch.allclose(shown.parts.sum(0), model(ids)[0].amax(-1), atol=1e-3)  # the parts add up to the logit
    assert torch.allclose(shown.patterns[1], trace(model, ids, "hook_pattern", 1)["hook_pattern", 1][0])
    assert [one[0].id for one in shown.lens[-1]] == [one.id for one in best]
    assert "\n" not in "".join(shown.labels) and "\u21b5" in "".join(shown.labels)
    json.dumps(shown.to_dict())


def test_notable_heads_are_the_best(shown: Overview) -> None:
    scores = shown.scores["previous"]
    (best, *_) = shown.notable_heads(2)["previous"]
    assert scores[best.layer, best.head] == scores.max() == best.score
    (written, *_) = shown.notable_heads()["logit"]
    rows = [i for i, name in enumerate(shown.part_names) if name.startswith("L")]
    assert abs(written.score) == shown.parts[rows, -1].abs().max()
    assert shown.part_names[rows[written.layer * 3 + written.head]] == f"L{written.layer}H{written.head}"


def test_an_overview_inside_an_intervention_is_of_the_changed_model(model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    with intervene(model, ablate_heads([(0, 1)])):
        changed = overview(model, "the cat", tokenizer=small_tokenizer)
    row = changed.part_names.index("L0H1")
    assert not changed.parts[row].any() and changed.parts[row + 1].any()


def test_texts_that_cannot_be_shown(model: GPT2, shown: Overview, small_tokenizer: GPT2Tokenizer) -> None:
    with pytest.raises(InputError, match="empty"):
        overview(model, "", tokenizer=small_tokenizer)
    with pytest.raises(InputError, match="141 tokens: the model takes 1 to 140"):
        overview(model, [1] * 141, tokenizer=small_tokenizer)
    with pytest.raises(InputError, match="2 tokens and the other text 3"):
        overview(model, [1, 2], patch_from=[1, 2, 3], tokenizer=small_tokenizer)
    with pytest.raises(InputError, match="at most 128"):
        html_page(overview(model, [1] * 129, tokenizer=small_tokenizer))
    single = overview(model, [1], tokenizer=small_tokenizer)
    assert single.loss is None and set(single.notable_heads()) == {"logit"}
    assert html_page(single).startswith("<!doctype html>")


def test_patterns_are_packed_without_what_is_masked(shown: Overview) -> None:
    packed = base64.b64decode(data_of(html_page(shown))["patterns"])
    n_tokens = len(shown.ids)
    per_head = n_tokens * (n_tokens + 1) // 2
    assert len(packed) == 6 * per_head
    layer, head, t, s = 1, 2, 7, 3
    value = packed[(layer * 3 + head) * per_head + t * (t + 1) // 2 + s]
    assert value == round(shown.patterns[layer, head, t, s].item() * 255)


def test_the_page_escapes_texts_and_loads_nothing(tmp_path: Path, shown: Overview) -> None:
    page = html_page(shown)
    assert page.count("</script>") == 2 and "<img" not in page and "<model>" not in page
    assert "".join(data_of(page)["labels"]) == "".join(shown.labels)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert not list(loads_from_elsewhere(tmp_path))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def contrast(one: str, other: str) -> float:
    """The contrast of two colours by WCAG 2.2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_is_readable_on_each_colour(colours: dict[str, Any]) -> None:
    behind = [colours["page"], colours["card"], *colours["surprisal"], *colours["share"]]
    assert min(contrast(colours["text"], one) for one in behind) >= 4.5
    assert min(contrast(colours["muted"], colours[one]) for one in ("page", "card")) >= 4.5


# ---- The page in a browser -------------------------------------------------------------------------------------------


def opened(browser: Any, folder: Path, shown: Overview, *, dark: bool = False, width: int = 1200) -> Path:
    path = folder / "page.html"
    path.write_text(html_page(shown), encoding="utf-8")
    visit(browser, path.as_uri(), dark=dark, width=width)
    return path


def pixels(browser: Any, selector: str) -> list[int]:
    code = """const c = document.querySelector(arguments[0]);
    return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]"""
    return browser.execute_script(code, selector)


def test_pointer_and_keys_change_what_is_shown(browser: Any, tmp_path: Path, shown: Overview) -> None:
    from selenium.webdriver import ActionChains, Keys

    path = opened(browser, tmp_path, shown)
    n_tokens, last = len(shown.ids), len(shown.ids) - 1
    assert text_of(browser, "#tokens") == "".join(shown.labels)
    assert len(browser.find_elements("css selector", "#heads canvas")) == 6
    assert len(browser.find_elements("css selector", "#next-bars tr")) == len(shown.guesses[0])
    assert f"token {last}, the last one" in text_of(browser, "#next-note")
    assert text_of(browser, "#next-bars th") == shown.guesses[-1][0].label

    # Over a token, the next tokens and the lines of the head are those of that token; after it, those of the chosen one.
    token = browser.find_element("id", "t2")
    ActionChains(browser).move_to_element(token).perform()
    assert text_of(browser, "#next-bars th") == shown.guesses[2][0].label
    assert f"({2}) looks most at" in text_of(browser, "#head-note")
    n_lines = len(browser.find_elements("css selector", "#lines line"))
    chosen = browser.find_element("css selector", "#heads [aria-pressed=true]").get_attribute("data-head")
    layer, head = map(int, chosen.split("."))
    levels = (shown.patterns[layer, head, 2] * 255).round() / 255
    assert n_lines == int((levels >= 0.01).sum())
    best = int(levels.argmax())
    assert f"“{shown.labels[best]}” ({best}): " in text_of(browser, "#head-note")
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    assert text_of(browser, "#next-bars th") == shown.guesses[-1][0].label

    # A click stays; arrow keys move on.
    token.click()
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    assert "token 2." in text_of(browser, "#next-note")
    browser.find_element("id", "tokens").send_keys(Keys.ARROW_RIGHT)
    assert "token 3." in text_of(browser, "#next-note")
    assert browser.find_element("id", "t3").get_attribute("aria-selected") == "true"
    browser.find_element("id", "tokens").send_keys(Keys.END)
    assert f"token {n_tokens - 1}" in text_of(browser, "#next-note")

    # A click on a head enlarges it, and arrow keys go to others.
    button = browser.find_element("css selector", "[data-head='1.1']")
    button.click()
    assert text_of(browser, "#head-title") == "Layer 1, head 1"
    rgba = pixels(browser, "#matrix")
    at = 4 * (5 * n_tokens + 1)
    low, high = (int(LIGHT[name][1:3], 16) for name in ("card", "accent"))
    assert rgba[at] == pytest.approx(low + (high - low) * shown.patterns[1, 1, 5, 1].item(), abs=2)
    button.send_keys(Keys.ARROW_UP)
    assert text_of(browser, "#head-title") == "Layer 0, head 1"
    assert pixels(browser, "#matrix") != rgba
    notable = browser.find_element("css selector", ".notables tr:last-child .notable button")
    browser.execute_script("arguments[0].scrollIntoView()", notable)
    notable.send_keys(Keys.ENTER)
    expected = shown.notable_heads()["logit"][0]
    assert text_of(browser, "#head-title") == f"Layer {expected.layer}, head {expected.head}"

    # Nothing was refused or wrong, and nothing but the file was asked for.
    assert not errors_of(browser)
    assert requested_by(browser) <= {path.as_uri()}


@pytest.mark.parametrize(("dark", "width"), [(True, 360), (False, 1200)], ids=["dark phone", "light"])
def test_it_fits_a_phone_and_has_a_dark_style(browser: Any, tmp_path: Path, shown: Overview, dark: bool, width: int) -> None:
    opened(browser, tmp_path, shown, dark=dark, width=width)
    wide, background = browser.execute_script(
        "return [document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
    )
    assert wide <= width
    assert background == as_rgb((DARK if dark else LIGHT)["page"])


def test_without_script_the_tables_remain(browser: Any, tmp_path: Path, shown: Overview) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(browser, tmp_path, shown)
        visible = browser.find_element("css selector", "body").text
        assert "Without script" in visible and "Next token" not in visible
        tables = browser.find_elements("css selector", "table")
        assert len(tables) == 5 and all(table.is_displayed() for table in tables)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
