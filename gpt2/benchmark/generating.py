"""Sections decode, prefill and batch: the speed of generation.

All engines are in memory at once, each in a separate process, and take turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from gpt2.benchmark.agreement import Oracle
from gpt2.benchmark.bench import Bench
from gpt2.benchmark.engine import Engine, Prompts
from gpt2.benchmark.engines import generating_engines, prepare_engine
from gpt2.benchmark.machine import WeightStream
from gpt2.benchmark.measure import Contender, speed, spread, take_turns
from gpt2.benchmark.results import Entrant, Quantity, Row, timed_rows
from gpt2.benchmark.settings import DTYPES
from gpt2.benchmark.subject import prompt_rows

SECTIONS = ("decode", "prefill", "batch")
MEMORY = "memory"  # listed like an engine: the speed at which reading all weights limits decoding


@dataclass(frozen=True)
class _Task:
    """The prompts and number of tokens for all engines, and the quantity that is measured."""

    quantity: Quantity
    prompts: Prompts
    n_new: int


def generating(bench: Bench) -> None:
    """Measure those of the three sections that the settings contain."""
    oracle = Oracle(bench.subject.folder)
    with _all_engines(bench) as engines:
        if "decode" in bench.settings.sections:
            _decode(bench, engines, oracle)
        if "prefill" in bench.settings.sections:
            for length in bench.settings.prefill_tokens:
                _prefill(bench, engines, oracle, length)
        if "batch" in bench.settings.sections:
            for batch_size in bench.settings.batch_sizes:
                _batch(bench, engines, oracle, batch_size)


@contextlib.contextmanager
def _all_engines(bench: Bench) -> Iterator[list[Engine]]:
    """Every engine in every dtype. The results say why others cannot take part."""
    engines: list[Engine] = []
    section = next(section for section in SECTIONS if section in bench.settings.sections)
    try:
        for name in generating_engines(bench.settings.peers):
            for dtype in bench.settings.dtypes:
                bench.say(f"loading {name} {dtype}")
                try:
                    path = prepare_engine(name, bench.subject, dtype)
                    engines.append(bench.parts.open_engine(name, path, bench.subject, dtype, bench.place))
                except Exception as error:  # an error in another library must not stop the benchmark
                    bench.results.leave_out(section, name, dtype, error)
        yield engines
    finally:
        for engine in engines:
            engine.close()


def _decode(bench: Bench, engines: list[Engine], oracle: Oracle) -> None:
    settings = bench.settings
    n = settings.new_tokens
    prompts = prompt_rows(bench.subject, bench.texts.prompts, [settings.prompt_tokens])
    quantity = Quantity("decode", f"prompt {settings.prompt_tokens}, {n} new", None, "tokens/s", n)
    engines, entrants = _checked(bench, engines, oracle, _Task(quantity, prompts, n))
    stream = WeightStream(bench.subject.config, bench.device)
    runs = [partial(engine.generate, prompts, length) for engine in engines for length in (n, 1)]
    bench.say(f"decode: {settings.rounds} rounds")
    contenders = [*map(Contender, runs), Contender(stream.read)]
    *times, reads = take_turns(contenders, settings.rounds, pause=bench.pause)
    stream_times = [seconds / stream.N_READS for seconds in reads]
    whole, first = times[0::2], times[1::2]
    later = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(whole, first, strict=True)]
    bench.results.rows += timed_rows(quantity, entrants, whole)
    limits = _memory_limits(bench, stream, stream_times)
    after_first = Quantity("decode", "after the first token", None, "tokens/s", n - 1)
    apart = timed_rows(after_first, entrants, later)
    shared = [_with_share(row, seconds, stream_times, n - 1) for row, seconds in zip(apart, later, strict=True)]
    bench.results.rows += shared + list(limits.values())


def _memory_limits(bench: Bench, stream: WeightStream, seconds: list[float]) -> dict[str, Row]:
    """For each dtype, the tokens per second if each token reads all weights once and nothing else takes time."""
    bandwidth = spread([stream.n_bytes / value for value in seconds])
    rows = {}
    for dtype in bench.settings.dtypes:
        of_float32 = DTYPES[dtype] / DTYPES["float32"]
        limit = speed([value * of_float32 for value in seconds], 1)
        entrant = Entrant(MEMORY, dtype, note="the limit: each token reads all weights once")
        rows[dtype] = Row("decode", "after the first token", None, entrant, "tokens/s", limit)
    bench.results.memory = {
        "gigabytes_per_second": round(bandwidth.median / 1e9, 2),
        "tokens_per_second": {dtype: round(row.value.median, 2) for dtype, row in rows.items() if row.value},
    }
    return rows


def _with_share(row: Row, seconds: list[float], stream_seconds: list[float], n_tokens: int) -> Row:
    """`row` with its share of the memory limit: the median of the rounds, whose two sides ran under equal conditions."""
    if row.value is None:
        return row
    of_float32 = DTYPES[row.entrant.dtype] / DTYPES["float32"]
    shares = [n_tokens * limit * of_float32 / own for limit, own in zip(stream_seconds, seconds, strict=True)]
    return replace(row, share_of_limit=spread(shares).median)


def _prefill(bench: Bench, engines: list[Engine], oracle: Oracle, length: int) -> None:
    prompts = prompt_rows(bench.subject, bench.texts.prompts, [length])
    quantity = Quantity("prefill", "to the first token", length, "tokens/s", length)
    _in_turns(bench, engines, oracle, _Task(quantity, prompts, 1))


def _batch(bench: Bench, engines: list[Engine], oracle: Oracle, batch_size: int) -> None:
    """Prompts of different lengths, as in practice: from half of `prompt_tokens` to `prompt_tokens`."""
    settings = bench.settings
    half, span = (settings.prompt_tokens + 1) // 2, settings.prompt_tokens // 2
    lengths = [settings.prompt_tokens - span * row // max(1, batch_size - 1) for row in range(batch_size)]
    prompts = prompt_rows(bench.subject, bench.texts.prompts, lengths)
    setting = f"prompts of {half} to {settings.prompt_tokens}, {settings.new_tokens} new each"
    quantity = Quantity("batch", setting, batch_size, "tokens/s", batch_size * settings.new_tokens)
    _in_turns(bench, engines, oracle, _Task(quantity, prompts, settings.new_tokens))


def _in_turns(bench: Bench, engines: list[Engine], oracle: Oracle, task: _Task) -> None:
    quantity = task.quantity
    engines, entrants = _checked(bench, engines, oracle, task)
    bench.say(f"{quantity.section} {quantity.number}: {bench.settings.rounds} rounds")
    contenders = [Contender(partial(engine.generate, task.prompts, task.n_new)) for engine in engines]
    times = take_turns(contenders, bench.settings.rounds, pause=bench.pause)
    bench.results.rows += timed_rows(quantity, entrants, times)


def _checked(bench: Bench, engines: list[Engine], oracle: Oracle, task: _Task) -> tuple[list[Engine], list[Entrant]]:
    """The engines to time: in float32 only those with the right ids. Each of the others gets a row without a value."""
    section, number = task.quantity.section, task.quantity.number
    bench.say(f"{section}{'' if number is None else f' {number}'}: comparing the ids of {len(engines)} engines")
    sound, entrants = [], []
    for engine in engines:
        try:
            found = engine.generate(task.prompts, task.n_new)
            entrant = oracle.judge(engine, task.prompts, task.n_new, found)
        except Exception as error:  # the same reason as above
            bench.results.leave_out(section, engine.name, engine.dtype, error)
            continue
        if entrant.agrees is False:
            bench.results.rows.append(task.quantity.row(entrant, None))
        else:
            sound.append(engine)
            entrants.append(entrant)
    return sound, entrants
