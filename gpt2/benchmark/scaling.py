"""Section scaling: time per token against context and model size, and peak memory.

Each measurement has a separate process, so that its peak memory is its own. They run one after another, not in turns.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gpt2.benchmark.bench import Bench
from gpt2.benchmark.engines import generating_engines
from gpt2.benchmark.measure import Spread
from gpt2.benchmark.results import Entrant, LeftOutError, Row
from gpt2.benchmark.subject import is_preset
from gpt_config.model_config import GPT2Config

# Bytes needed in addition to the weights: torch, the cache and intermediate results.
_BESIDE = 1_000_000_000


def scaling(bench: Bench) -> None:
    """Measure each size for which there is enough memory and disk space."""
    for size in bench.settings.sizes:
        try:
            _check_room(bench, size)
            # Removed before the next size is made: the weights of the largest take 6 GB.
            with tempfile.TemporaryDirectory(dir=bench.subject.work) as work:
                bench.say(f"scaling {size}: making the model")
                _in_a_process(bench, "make", size=size, work=work, seed=bench.settings.seed)
                _measure_size(bench, size, Path(work))
        except LeftOutError as error:
            bench.results.leave_out(f"scaling {size}", "all", "", error)


def _check_room(bench: Bench, size: str) -> None:
    if not is_preset(size):
        return  # the size of a named model is known only when it is loaded
    needed = 4 * GPT2Config.preset(size).n_parameters + _BESIDE  # made in float32, even if it runs in another dtype
    free, disk = bench.parts.free_memory(), shutil.disk_usage(bench.subject.work).free
    for what, there in (("memory", free), ("disk space in the temporary folder", disk)):
        if there is not None and needed > there:
            raise LeftOutError(f"not enough {what}: it needs {needed / 1e9:.1f} GB, and {there / 1e9:.1f} GB are free")


def _measure_size(bench: Bench, size: str, work: Path) -> None:
    for name in generating_engines(bench.settings.peers):
        for dtype in bench.settings.dtypes:
            bench.say(f"scaling {size}: {name} {dtype}")
            engine = {"work": str(work), "name": name, "dtype": dtype}
            try:
                path = _in_a_process(bench, "prepare", **engine)["path"]
                found = _in_a_process(
                    bench, "measure", **engine, path=path, threads=bench.settings.threads, device=bench.settings.device,
                    rounds=bench.settings.rounds, contexts=bench.settings.contexts,
                )  # fmt: skip
            except LeftOutError as error:
                bench.results.leave_out(f"scaling {size}", name, dtype, error)
                continue
            bench.results.rows += _rows(size, Entrant(name, dtype), found)


def _rows(size: str, entrant: Entrant, found: dict[str, Any]) -> list[Row]:
    rows = [
        Row("scaling", size, context, entrant, "ms/token", Spread(*milliseconds))
        for context, milliseconds in found["milliseconds"]
    ]
    for when in ("load", "use"):
        megabytes = found[f"peak_{when}"] / 1e6
        rows.append(Row("scaling", f"{size}, peak memory, {when}", None, entrant, "MB", Spread(*[megabytes] * 3)))
    return rows


def _in_a_process(bench: Bench, task: str, **arguments: Any) -> dict[str, Any]:
    out = bench.parts.run_python(
        ["-m", "gpt2.benchmark.scaling_process", task, json.dumps(arguments)], bench.settings.threads
    )
    values: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    if "left_out" in values:
        raise LeftOutError(values["left_out"])
    return values
