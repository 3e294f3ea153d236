"""Section tokenizer: encode text that is new to a tokenizer, encode it again, and decode it."""

from __future__ import annotations

import contextlib
from functools import partial

from gpt2.benchmark.bench import Bench
from gpt2.benchmark.codecs import MAKERS, CodecAtWork
from gpt2.benchmark.measure import Contender, take_turns
from gpt2.benchmark.processes import Apart
from gpt2.benchmark.results import Entrant, LeftOutError, Quantity, Row, timed_rows
from gpt2.benchmark.settings import OURS


def tokenizing(bench: Bench) -> None:
    """Measure three things for each text: encoding by a new tokenizer, encoding once more, and decoding."""
    codecs: dict[str, Apart] = {}
    with contextlib.ExitStack() as stack:
        for name in MAKERS:
            if name != OURS and name not in bench.settings.peers:
                continue
            try:
                codecs[name] = Apart(CodecAtWork, name, bench.subject, bench.texts.by_name)
            except Exception as error:  # an error in another library must not stop the benchmark
                bench.results.leave_out("tokenizer", name, "", error)
            else:
                stack.callback(codecs[name].close)
        for text in bench.texts.by_name if OURS in codecs else ():
            measure_text(bench, text, codecs)


def measure_text(bench: Bench, text: str, codecs: dict[str, Apart]) -> None:
    """Compare the results of all codecs on the text named `text`, then time those that agree with ours."""
    codecs = _checked(bench, text, codecs)
    megabytes = len(bench.texts.by_name[text].encode()) / 1e6
    settings = {
        f"encode {text}, new": [
            Contender(partial(_encode_new, text), partial(_renewed, codec)) for codec in codecs.values()
        ],
        f"encode {text}, seen": [Contender(partial(codec.ask, "encode_seen", text)) for codec in codecs.values()],
        f"decode {text}": [Contender(partial(codec.ask, "decode", text)) for codec in codecs.values()],
    }
    entrants = [Entrant(peer, agrees=True) for peer in codecs]
    for setting, contenders in settings.items():
        bench.say(f"tokenizer: {setting}, {bench.settings.rounds} rounds")
        times = take_turns(contenders, bench.settings.rounds)
        bench.results.rows += timed_rows(Quantity("tokenizer", setting, None, "MB/s", megabytes), entrants, times)


def _renewed(codec: Apart) -> tuple[Apart]:
    codec.ask("renew")
    return (codec,)


def _encode_new(text: str, codec: Apart) -> None:
    codec.ask("encode_new", text)


def _checked(bench: Bench, text: str, codecs: dict[str, Apart]) -> dict[str, Apart]:
    """The codecs whose ids and decoded text equal ours. Each of the others gets a row without a value."""
    expected, sound = codecs[OURS].ask("digests", text), {}
    for peer, codec in codecs.items():
        try:
            found = expected if peer == OURS else codec.ask("digests", text)
        except LeftOutError as error:
            bench.results.leave_out("tokenizer", peer, "", error)
            continue
        if found == expected:
            sound[peer] = codec
        else:
            wrong = Entrant(peer, agrees=False, note="its ids or texts differ: not timed")
            bench.results.rows.append(Row("tokenizer", f"encode {text}", None, wrong, "MB/s", None))
    return sound
