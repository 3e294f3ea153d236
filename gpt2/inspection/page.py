"""One HTML page of an Overview. It loads nothing, opens from a file, and has tables for browsers without script.

The page, its style and its script are the files in `web`; this module fills in the values. It computes nothing.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, tostring

from gpt2.inspection.colours import share_level, surprisal_level
from gpt2.inspection.overviews import Head, Overview, signed
from gpt2.inspection.self_contained import self_contained_page
from gpt_config.errors import InputError
from gpt_config.json_text import to_json

MAX_TOKENS = 128
MEASURES = {
    "previous": "attend to the token before",
    "duplicate": "attend to the same token earlier",
    "induction": "attend to the token after the same token earlier (induction)",
    "logit": "write most for or against the prediction (logits)",
}


def html_page(shown: Overview) -> str:
    """Return the HTML page of an overview of at most 128 tokens, as one self-contained text for `atomic_write_text`.

    Its content-security policy allows its own style and script only. 12 x 12 heads and 128 tokens take about 2 MB.
    """
    n_tokens = len(shown.ids)
    if n_tokens > MAX_TOKENS:
        raise InputError(f"the text has {n_tokens} tokens, and a page shows at most {MAX_TOKENS}: shorten the text")
    text = "".join(shown.labels)
    fields = {
        "title": html.escape(text if len(text) <= 60 else f"{text[:60]}…"),
        "facts": html.escape(_facts(shown)),
        "tokens": _html(_tokens(shown)),
        "next_table": _html(_next_table(shown)),
        "heads_table": _html(_heads_table(shown)),
        "lens_table": _html(_lens_table(shown)),
        "attribution": "".join(map(_html, _attribution(shown))),
        "patching": "".join(map(_html, _patching(shown))),
        "data": _data(shown),
    }
    return self_contained_page("gpt2.inspection", "page", fields)


def packed_patterns(shown: Overview) -> str:
    """Return the patterns as base64 of bytes, 255 for 1: for each layer, head and token t the weights of tokens 0 to t."""
    n_tokens = len(shown.ids)
    seen = shown.patterns.new_ones(n_tokens, n_tokens).tril().bool()
    levels = (shown.patterns[:, :, seen].clamp(0, 1) * 255).round().byte()
    return base64.b64encode(levels.contiguous().numpy().tobytes()).decode("ascii")


def _data(shown: Overview) -> str:
    """The values for the script, as JSON without "<", which could end the element."""
    posts = _posts(shown)
    values = {
        "layers": shown.n_layer,
        "heads": shown.n_head,
        "labels": shown.labels,
        "bits": [None if bits is None else round(bits, 2) for bits in shown.bits],
        "next": [[[one.label, round(one.probability, 4), one.id] for one in guesses] for guesses in shown.guesses],
        "ids": shown.ids,
        "lens": [[[[one.label, round(one.probability, 3)] for one in place[:3]] for place in shown.lens[i]] for i in posts],
        "partNames": shown.part_names,
        "parts": [[round(value, 3) for value in row] for row in shown.parts.tolist()],
        "scores": {name: [[round(v, 3) for v in row] for row in scores.tolist()] for name, scores in shown.scores.items()},
        "patterns": packed_patterns(shown),
    }
    return to_json(values, separators=(",", ":")).replace("<", "\\u003c")


def _facts(shown: Overview) -> str:
    loss = "" if shown.loss is None else f"loss {shown.loss:.3f} nats per token"
    facts = [shown.model, f"{len(shown.ids)} tokens", f"{shown.n_layer} layers of {shown.n_head} heads", loss, shown.change]
    return " · ".join(filter(None, facts))


# ---- What is also there without script. Elements escape their texts. ------------------------------------------------


def _element(tag: str, content: str | Iterable[Element] = "", **attributes: str) -> Element:
    made = Element(tag, {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()})
    if isinstance(content, str):
        made.text = content
    else:
        made.extend(content)
    return made


def _html(element: Element) -> str:
    return tostring(element, encoding="unicode", method="html")


def _table(head: Sequence[str], rows: Iterable[Sequence[Element]], **attributes: str) -> Element:
    top = _element("thead", [_element("tr", [_element("th", name, scope="col") for name in head])])
    return _element("table", [top, _element("tbody", [_element("tr", row) for row in rows])], **attributes)


def _tokens(shown: Overview) -> Element:
    def token(place: int, label: str, bits: float | None) -> Element:
        level = "" if bits is None else f" s{surprisal_level(bits)}"
        said = "not scored" if bits is None else f"{bits:.1f} bits"
        return _element("span", label, class_=f"token{level}", id=f"t{place}", title=said)

    tokens = map(token, range(len(shown.ids)), shown.labels, shown.bits)
    return _element("p", tokens, id="tokens")


def _next_table(shown: Overview) -> Element:
    rows = []
    for place, (label, bits, guesses) in enumerate(zip(shown.labels, shown.bits, shown.guesses, strict=True)):
        cells = [str(place), label, "" if bits is None else f"{bits:.1f}"]
        guessed = [_element("td", f"{one.label} {one.probability:.0%}", class_="piece") for one in guesses[:3]]
        rows.append([_element("td", cells[0]), _element("td", cells[1], class_="piece"), _element("td", cells[2]), *guessed])
    return _table(["place", "token", "bits", *["next"] * min(3, len(shown.guesses[0]))], rows)


def _heads_table(shown: Overview) -> Element:
    def cell(one: Head, measure: str) -> Element:
        score = f"{one.score:+.2f}" if measure == "logit" else f"{one.score:.2f}"
        text = _element("span", f"{one.layer}.{one.head}", class_="name")
        text.tail = f" {score}"
        return _element("td", [text], class_="notable", data_layer=str(one.layer), data_head=str(one.head))

    rows = [
        [_element("th", MEASURES[name], scope="row"), *(cell(one, name) for one in heads)]
        for name, heads in shown.notable_heads().items()
    ]
    width = max(map(len, rows)) - 1
    return _table(["heads that", "best", *[""] * (width - 1)], rows, class_="notables")


def _posts(shown: Overview) -> list[int]:
    """The lines of the lens after each layer."""
    return [i for i, name in enumerate(shown.lens_names) if name.endswith("hook_resid_post")]


def _lens_table(shown: Overview) -> Element:
    rows = []
    for layer, line in enumerate(_posts(shown)):
        guessed = [
            _element(
                "td",
                best.label,
                class_=f"piece p{share_level(best.probability)}",
                title=f"{best.probability:.0%}",
                data_place=str(place),
            )
            for place, (best, *_) in enumerate(shown.lens[line])
        ]
        rows.append([_element("th", str(layer), scope="row"), *guessed])
    return _table(["layer", *shown.labels], rows, class_="lens")


def _bar_rows(names: Sequence[str], values: Sequence[float]) -> Element:
    """Bars as SVG, whose lengths are attributes: the policy of the page allows no style attributes."""
    largest = max(map(abs, values)) or 1.0

    def bar(value: float) -> Element:
        width = 50 * abs(value) / largest
        x = 50.0 if value >= 0 else 50 - width
        sign = "positive" if value >= 0 else "negative"
        drawn = _element("rect", x=f"{x:.2f}", y="0", width=f"{width:.2f}", height="10", class_=sign)
        return _element("svg", [drawn], viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true")

    rows = [
        [_element("th", name, scope="row", class_="piece"), _element("td", [bar(value)], class_="bar"),
         _element("td", f"{value:+.2f}")]
        for name, value in zip(names, values, strict=True)
    ]  # fmt: skip
    return _element("table", [_element("tbody", [_element("tr", row) for row in rows])], class_="bars")


def _attribution(shown: Overview) -> list[Element]:
    found = shown.attribution
    if found is None:
        return []
    note = (
        f"How much each token of the text raises the log-probability of “{found.target.label}” after the last token, "
        f"in nats: integrated gradients from zero embeddings. Their sum is {sum(found.scores):.3f}, the difference "
        f"{found.total:.3f}."
    )
    return [
        _element(
            "section",
            [
                _element("h2", "Tokens that matter"),
                _element("p", note, class_="note"),
                _bar_rows(shown.labels, found.scores),
            ],
            id="attribution",
        )
    ]


def _patching(shown: Overview) -> list[Element]:
    found = shown.patching
    if found is None:
        return []
    note = (
        f"The residual stream before a layer, at one token, is taken from “{''.join(found.labels)}”. The numbers are the "
        f"changes of the log-probability of “{found.target.label}”, in nats. It is {found.before:.2f} here and "
        f"{found.other:.2f} there."
    )
    rows = [
        [_element("th", str(layer), scope="row"), *map(_change, changes, shares)]
        for layer, (changes, shares) in enumerate(zip(found.changes.tolist(), found.shares.tolist(), strict=True))
    ]
    heads = ["layer", *(a if a == b else f"{a} ← {b}" for a, b in zip(shown.labels, found.labels, strict=True))]
    table = _element("div", [_table(heads, rows, class_="lens")], class_="wide")
    return [_element("section", [_element("h2", "Patching"), _element("p", note, class_="note"), table], id="patching")]


def _change(change: float, share: float) -> Element:
    kind = "p" if share >= 0 else "s"
    return _element("td", signed(change), class_=f"{kind}{min(share_level(abs(share)), 4)}")
