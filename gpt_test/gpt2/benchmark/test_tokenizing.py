"""Section tokenizer: which tokenizers are timed, and the digests by which they are compared. No times are asserted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpt2.benchmark.bench import Bench, Measure, Parts
from gpt2.benchmark.codecs import MAKERS, Codec, CodecAtWork
from gpt2.benchmark.results import LeftOutError, Results
from gpt2.benchmark.run import run_sections
from gpt2.benchmark.settings import OURS, Settings
from gpt2.benchmark.subject import Subject
from gpt2.benchmark.texts import Texts
from gpt2.benchmark.tokenizing import measure_text
from gpt_encoder import GPT2Tokenizer

TEXTS = {"short": "the cat sat", "other": "é 😀\ud800"}


class Peer:
    """Replaces a process: returns these digests, or fails in one method."""

    def __init__(self, *, ids: str = "right", breaks_at: str = "") -> None:
        self._ids, self._breaks_at = ids, breaks_at
        self.asked: list[str] = []

    def ask(self, method: str, *arguments: object) -> Any:
        self.asked.append(method)
        if method == self._breaks_at:
            raise LeftOutError("broke")
        return (self._ids, "text") if method == "digests" else None


def test_only_tokenizers_with_the_same_ids_are_timed() -> None:
    peers = {OURS: Peer(), "same": Peer(), "other": Peer(ids="wrong"), "broken": Peer(breaks_at="digests")}
    results = Results()
    bench: Any = SimpleNamespace(
        results=results, texts=SimpleNamespace(by_name=TEXTS), settings=SimpleNamespace(rounds=2), say=lambda line: None
    )
    measure_text(bench, "short", peers)  # type: ignore[arg-type]
    timed = [(row.setting, row.entrant.engine) for row in results.rows if row.value is not None]
    assert sorted(timed) == sorted(
        (f"{what} short{how}", name)
        for what, how in (("encode", ", new"), ("encode", ", seen"), ("decode", ""))
        for name in (OURS, "same")
    )
    [wrong] = [row for row in results.rows if row.value is None]
    assert wrong.entrant.engine == "other" and wrong.entrant.agrees is False
    [left_out] = results.left_out
    assert (left_out.engine, left_out.reason) == ("broken", "broke")
    assert peers["same"].asked.count("renew") == peers["same"].asked.count("encode_new") == 3  # a warm-up and two rounds
    assert peers["other"].asked == ["digests"]


def test_a_failure_during_timing_does_not_stop_the_other_sections() -> None:
    done: list[str] = []
    measures = [
        Measure(("tokenizer",), lambda bench: Peer(breaks_at="renew").ask("renew")),
        Measure(("load",), lambda bench: done.append("load")),
        Measure(("training",), lambda bench: done.append("training")),
    ]
    results, settings = Results(), Settings(sections=("tokenizer", "training"))
    texts, subject = Texts(TEXTS, "the test's"), Subject(Path(), Path())
    run_sections(Bench(settings, subject, texts, results, lambda line: None, Parts(measures=measures)))
    assert done == ["training"]
    [left_out] = results.left_out
    assert (left_out.section, left_out.reason) == ("tokenizer", "broke")


def test_digests_distinguish_ids_and_texts(openai_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def maker(encode: Any, decode: Any) -> Any:
        return lambda subject: Codec(encode, decode)

    ours = openai_tokenizer
    monkeypatch.setitem(MAKERS, "ours", maker(ours.encode, ours.decode))
    monkeypatch.setitem(MAKERS, "other ids", maker(lambda text: [*ours.encode(text), 0], lambda ids: ours.decode(ids[:-1])))
    monkeypatch.setitem(MAKERS, "other text", maker(ours.encode, lambda ids: ours.decode(ids) + " "))
    for text in TEXTS:
        works = [CodecAtWork(name, None, TEXTS) for name in ("ours", "ours", "other ids", "other text")]  # type: ignore[arg-type]
        first, again, ids, words = (work.digests(text) for work in works)
        assert first == again
        assert [a == b for a, b in zip(first, ids, strict=True)] == [False, True]
        assert [a == b for a, b in zip(first, words, strict=True)] == [True, False]
        for work in works:
            work.renew()
            work.encode_new(text)
            work.encode_seen(text)
            work.decode(text)
