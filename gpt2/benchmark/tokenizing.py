"""Section tokenizer: text to ids and back, on text whose words are new to a tokenizer and on text it has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from gpt2.benchmark.measure import Contender, take_turns
from gpt2.benchmark.results import Entrant, LeftOutError, Row, timed_rows
from gpt2.benchmark.settings import OURS
from gpt2.benchmark.subject import Subject
from gpt_encoder.tokenizer import GPT2Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from gpt2.benchmark.run import Bench


@dataclass(frozen=True)
class Codec:
    """A tokenizer just made: ordinary text to ids, and ids to text."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def tokenizing(bench: Bench) -> None:
    """Measure each text three times: encoded by a new tokenizer, encoded once more, and decoded."""
    makers = {name: make for name, make in _MAKERS.items() if name == OURS or name in bench.settings.peers}
    codecs = {}
    for name, make in makers.items():
        try:
            codecs[name] = make(bench.subject)
        except Exception as error:  # whatever goes wrong in a library of others, the rest is measured
            bench.results.leave_out("tokenizer", name, "", error)
    for name, text in bench.texts.by_name.items():
        _measure_text(bench, name, text, codecs, makers)


def _measure_text(
    bench: Bench, name: str, text: str, codecs: dict[str, Codec], makers: dict[str, Callable[[Subject], Codec]]
) -> None:
    codecs = _checked(bench, name, text, codecs)
    megabytes, ids = len(text.encode()) / 1e6, codecs[OURS].encode(text)
    settings = {
        f"encode {name}, new": [
            Contender(partial(_encode, text), partial(_new, makers[peer], bench.subject)) for peer in codecs
        ],
        f"encode {name}, seen": [Contender(partial(codec.encode, text)) for codec in codecs.values()],
        f"decode {name}": [Contender(partial(codec.decode, ids)) for codec in codecs.values()],
    }
    entrants = [Entrant(peer, agrees=True) for peer in codecs]
    for setting, contenders in settings.items():
        bench.say(f"tokenizer: {setting}, {bench.settings.rounds} rounds")
        times = take_turns(contenders, bench.settings.rounds)
        bench.results.rows += timed_rows("tokenizer", setting, None, entrants, times, megabytes, "MB/s")


def _new(make: Callable[[Subject], Codec], subject: Subject) -> tuple[Codec]:
    return (make(subject),)


def _encode(text: str, codec: Codec) -> list[int]:
    return codec.encode(text)


def _checked(bench: Bench, name: str, text: str, codecs: dict[str, Codec]) -> dict[str, Codec]:
    """Those that give our ids; the others get a row without a figure."""
    expected, sound = codecs[OURS].encode(text), {}
    for peer, codec in codecs.items():
        found = codec.encode(text)
        if found == expected and codec.decode(found) == codecs[OURS].decode(expected):
            sound[peer] = codec
        else:
            wrong = Entrant(peer, agrees=False, note="its ids or texts are others: not timed")
            bench.results.rows.append(Row("tokenizer", f"encode {name}", None, wrong, "MB/s", None))
    return sound


def _ours(subject: Subject) -> Codec:
    tokenizer = load_tokenizer(subject.folder)
    return Codec(tokenizer.encode, tokenizer.decode)


def _tiktoken(subject: Subject) -> Codec:
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str  # its own pattern, not ours

    tokenizer = subject.tokenizer
    if not isinstance(tokenizer, GPT2Tokenizer):
        raise LeftOutError("has byte pairs only")
    ranks = {token: rank for rank, token in tokenizer.token_bytes.items() if rank not in tokenizer.special_tokens.values()}
    special = dict(tokenizer.special_tokens)
    encoding = tiktoken.Encoding("subject", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    return Codec(encoding.encode_ordinary, encoding.decode)


def _tokenizers(subject: Subject) -> Codec:
    from tokenizers import Tokenizer

    path = subject.folder / "tokenizer.json"
    if not path.is_file():
        raise LeftOutError("needs a tokenizer.json, which this tokenizer does not write")
    tokenizer = Tokenizer.from_file(str(path))
    return Codec(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode)


_MAKERS: dict[str, Callable[[Subject], Codec]] = {OURS: _ours, "tiktoken": _tiktoken, "tokenizers": _tokenizers}
