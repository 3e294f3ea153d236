"""Run a whole benchmark: its sections in order, with one object for the results. It measures nothing itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from gpt2.benchmark.bench import Bench, Measure, Parts, Say
from gpt2.benchmark.busy import busy_processes
from gpt2.benchmark.machine import environment, installed_version
from gpt2.benchmark.results import LeftOutError, Results
from gpt2.benchmark.settings import SECTIONS, Settings
from gpt2.benchmark.subject import Subject, make_subject, temporary_folder
from gpt2.benchmark.texts import Texts
from gpt_config.errors import InputError

# Packages that are also needed, to write a peer's model files.
_NEEDED_TOO = {"ctranslate2": ("transformers",), "llama-cpp-python": ("gguf",)}

# Peers that are measured on a CPU only, because their support of other devices depends on how they were built.
_ON_A_CPU = ("ctranslate2", "llama-cpp-python")


def run_benchmark(
    settings: Settings,
    name: str | None,
    preset: str,
    texts: Texts,
    say: Say,
    show_unfinished: Callable[[Results], object] = lambda results: None,
    *,
    parts: Parts | None = None,
) -> Results:
    """The results of the sections in `settings`, on the model `name` or on random weights in the shape of `preset`.

    ConfigError or InputError if the settings do not fit the model. If an engine fails, the results give the reason, and the
    others are still measured. If Ctrl-C or SIGTERM ends the process, `show_unfinished` is called first, unless nothing was
    measured yet.
    """
    import torch

    from gpt2.device import resolve_device

    parts = parts or Parts()
    device = resolve_device(settings.device)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device={settings.device!r} cannot be timed: use cpu or cuda")
    settings = dataclasses.replace(settings, device=device.type if device.type == "cpu" else str(device))
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    results = Results(
        environment(settings.threads, device), dataclasses.asdict(settings) | {"model": name or f"random weights, {preset}"}
    )
    results.settings["texts"] = texts.described()
    settings = dataclasses.replace(settings, peers=able_peers(settings, results, parts.installed_version))

    def last_words() -> None:
        if results.rows:
            results.leave_out("the rest", "all", "", LeftOutError("stopped by a signal during a measurement"))
            show_unfinished(results)

    try:
        with temporary_folder(last_words, parts.temporary_root) as work:
            bench = Bench(settings, _subject(settings, name, preset, work, say), texts, results, say, parts)
            with busy_processes(settings.beside):
                run_sections(bench)
    finally:
        torch.set_num_threads(threads)
    return results


def able_peers(
    settings: Settings, results: Results, installed_version: Callable[[str], str | None] = installed_version
) -> tuple[str, ...]:
    """The peers that are installed and can run on the device of `settings`. `results` say why others are left out."""
    able = []
    for peer in settings.peers:
        missing = [package for package in (peer, *_NEEDED_TOO.get(peer, ())) if installed_version(package) is None]
        results.peers[peer] = f"{' and '.join(missing)} not installed" if missing else installed_version(peer) or ""
        if missing:
            error = LeftOutError(f"{results.peers[peer]} (pip install '.[benchmark]')")
            results.leave_out("", peer, "", error)
        elif peer in _ON_A_CPU and settings.device != "cpu":
            results.leave_out("", peer, "", LeftOutError("is measured on a CPU only"))
        else:
            able.append(peer)
    return tuple(able)


def _subject(settings: Settings, name: str | None, preset: str, work: Path, say: Say) -> Subject:
    if set(settings.sections) == {"scaling"}:
        return Subject(work / "model", work)  # section scaling makes its own models
    say(f"model: {name or f'random weights, {preset}'}")
    subject = make_subject(name, preset, settings.seed, work)
    _check_lengths(settings, subject.config.n_positions)
    return subject


def _check_lengths(settings: Settings, limit: int) -> None:
    wanted = {}
    if {"decode", "batch"} & set(settings.sections):
        wanted["prompt_tokens + new_tokens"] = settings.prompt_tokens + settings.new_tokens
    if "prefill" in settings.sections:
        wanted["prefill_tokens"] = max(settings.prefill_tokens)
    if "load" in settings.sections:
        wanted["prompt_tokens"] = settings.prompt_tokens
    if "training" in settings.sections:
        wanted["train_context"] = settings.train_context
    for option, value in wanted.items():
        if value > limit:
            raise InputError(f"{option} is {value}, and the model sees {limit} tokens: choose less")


def run_sections(bench: Bench) -> None:
    """Measure the sections in the settings, in order. If the process of an engine ends, the next sections still run."""
    wanted = [section for section in SECTIONS if section in bench.settings.sections]
    measures = all_measures() if bench.parts.measures is None else bench.parts.measures
    for measure in measures:
        if mine := [section for section in wanted if section in measure.sections]:
            try:
                measure.run(bench)
            except LeftOutError as error:  # a process ended while it was timed
                bench.results.leave_out(mine[0], "the rest", "", error)


def all_measures() -> list[Measure]:
    """The measures of all sections, in order."""
    # Imported here, because the sections import torch and some of the peers.
    from gpt2.benchmark.generating import SECTIONS as GENERATING
    from gpt2.benchmark.generating import generating
    from gpt2.benchmark.loading import loading
    from gpt2.benchmark.scaling import scaling
    from gpt2.benchmark.tokenizing import tokenizing
    from gpt2.benchmark.training import training

    return [
        Measure(("tokenizer",), tokenizing),
        Measure(GENERATING, generating),
        Measure(("load",), loading),
        Measure(("training",), training),
        Measure(("scaling",), scaling),
    ]
