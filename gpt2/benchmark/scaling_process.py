"""The tasks that section scaling runs in separate processes: make a model, write it in an engine's format, measure it.

python -m gpt2.benchmark.scaling_process make|prepare|measure JSON    prints JSON
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpt2.benchmark.engine import Place
from gpt2.benchmark.engines import open_engine, prepare_engine
from gpt2.benchmark.machine import peak_memory
from gpt2.benchmark.measure import Contender, spread, take_turns
from gpt2.benchmark.results import LeftOutError
from gpt2.benchmark.subject import Subject, is_preset, make_subject
from gpt_config.errors import GPT2Error

# Tokens generated at each context; all of them are assumed to take the same time. The time of the prompt is subtracted, so
# its variation is divided by this number. At 1,024 tokens, int8 took 28 to 59 ms per token in two runs with 8 tokens, and 29
# to 38 ms with 24.
_TOKENS = 24


def make(*, size: str, work: str, seed: int) -> dict[str, Any]:
    """Make the model of this size in `work`. Returns its folder."""
    folder = make_subject(None if is_preset(size) else size, size, seed, Path(work)).folder
    return {"folder": str(folder)}


def prepare(*, work: str, name: str, dtype: str) -> dict[str, Any]:
    """Write the model in the engine's format. Returns the path."""
    return {"path": str(prepare_engine(name, _subject(work), dtype))}


def measure(
    *, work: str, name: str, dtype: str, path: str, threads: int, device: str, rounds: int, contexts: list[int]
) -> dict[str, Any]:
    """Milliseconds per token at each context: (median, low, high). Peak memory in bytes after loading and at the end."""
    subject = _subject(work)
    engine = open_engine(name, Path(path), subject, dtype, Place(threads, device))
    peak_load = peak_memory(device)
    fitting = [context for context in contexts if context <= subject.config.n_positions]
    milliseconds = []
    for context in fitting:
        n_new = min(_TOKENS, context // 2) + 1
        prompt = [[token % subject.config.vocab_size for token in range(100, 100 + context - n_new + 1)]]
        whole, first = take_turns([Contender(partial(engine.generate, prompt, n)) for n in (n_new, 1)], rounds)
        # The median time to the first token is subtracted, because that of one round may include a pause of the machine.
        each = [max(0.0, seconds - statistics.median(first)) * 1000 / (n_new - 1) for seconds in whole]
        found = spread(each)
        milliseconds.append((context, (found.median, found.low, found.high)))
    return {"milliseconds": milliseconds, "peak_load": peak_load, "peak_use": peak_memory(device)}


def _subject(work: str) -> Subject:
    return Subject(Path(work) / "model", Path(work))


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"make": make, "prepare": prepare, "measure": measure}


def main() -> None:
    """Run the task and print its result. If an engine cannot do it, the result says why under "left_out"."""
    try:
        print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
    except (LeftOutError, GPT2Error) as error:
        print(json.dumps({"left_out": str(error)}))


if __name__ == "__main__":
    main()
