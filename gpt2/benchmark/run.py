"""A whole benchmark: its sections in their order, into one set of results. It measures nothing itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.benchmark.engines import Place
from gpt2.benchmark.machine import environment, installed_version
from gpt2.benchmark.results import LeftOutError, Results
from gpt2.benchmark.settings import SECTIONS, Settings
from gpt2.benchmark.subject import Subject, make_subject, temporary_folder
from gpt2.benchmark.texts import Texts
from gpt_config.errors import InputError

if TYPE_CHECKING:
    import torch

# What a peer needs besides itself to be given a model.
_NEEDED_TOO = {"llama-cpp-python": ("gguf",)}

# Measured on a CPU alone: on what else they compute depends on how they were built.
_ON_A_CPU = ("ctranslate2", "llama-cpp-python")

Say = Callable[[str], None]


@dataclasses.dataclass
class Bench:
    """What each section is given. `say` tells the user what is going on."""

    settings: Settings
    subject: Subject
    texts: Texts
    results: Results
    say: Say

    @property
    def place(self) -> Place:
        """Where engines compute."""
        return Place(self.settings.threads, self.settings.device)

    @property
    def device(self) -> torch.device:
        """The same, as torch has it."""
        import torch

        return torch.device(self.settings.device)

    @property
    def pause(self) -> float:
        """Seconds between two engines: with several threads, some still spin after their work."""
        return 0.0 if self.settings.threads == 1 else 0.25


def run_benchmark(
    settings: Settings,
    name: str | None,
    preset: str,
    texts: Texts,
    say: Say,
    show_unfinished: Callable[[Results], object] = lambda results: None,
) -> Results:
    """Measure what `settings` ask for on the model `name`, or on random weights in the shape of `preset`.

    ConfigError or InputError if they do not fit the model. What goes wrong with an engine is noted and the rest goes on.
    Where Ctrl-C or SIGTERM ends the process, `show_unfinished` is called before, if anything was measured.
    """
    import torch

    from gpt2.device import resolve_device

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
    settings = dataclasses.replace(settings, peers=_able_peers(settings, results))

    def last_words() -> None:
        if results.rows:
            results.leave_out("the rest", "all", "", LeftOutError("stopped by a signal, amid what was being measured"))
            show_unfinished(results)

    try:
        with temporary_folder(last_words) as work:
            _run_sections(Bench(settings, _subject(settings, name, preset, work, say), texts, results, say))
    finally:
        torch.set_num_threads(threads)
    return results


def _able_peers(settings: Settings, results: Results) -> tuple[str, ...]:
    """Those of the peers that can be imported, and compute where they are to; the others are noted."""
    able = []
    for peer in settings.peers:
        missing = [package for package in (peer, *_NEEDED_TOO.get(peer, ())) if installed_version(package) is None]
        results.peers[peer] = f"{' and '.join(missing)} not installed" if missing else installed_version(peer) or ""
        if missing:
            error = LeftOutError(f"{results.peers[peer]} (pip install 'gpt2-from-scratch[benchmark]')")
            results.leave_out("", peer, "", error)
        elif peer in _ON_A_CPU and settings.device != "cpu":
            results.leave_out("", peer, "", LeftOutError("is measured on a CPU alone"))
        else:
            able.append(peer)
    return tuple(able)


def _subject(settings: Settings, name: str | None, preset: str, work: Path, say: Say) -> Subject:
    if set(settings.sections) == {"scaling"}:
        return Subject(work / "model", work)  # it makes its own models: nobody will look at this one
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


def _run_sections(bench: Bench) -> None:
    # Here, for a section brings along what it measures: torch, and some of its peers.
    from gpt2.benchmark.generating import SECTIONS as GENERATING
    from gpt2.benchmark.generating import generating
    from gpt2.benchmark.loading import loading
    from gpt2.benchmark.scaling import scaling
    from gpt2.benchmark.tokenizing import tokenizing
    from gpt2.benchmark.training import training

    wanted = [section for section in SECTIONS if section in bench.settings.sections]
    parts = (("tokenizer",), tokenizing), (GENERATING, generating), (("load",), loading), (("training",), training)
    for sections, measure in (*parts, (("scaling",), scaling)):
        if mine := [section for section in wanted if section in sections]:
            try:
                measure(bench)
            except LeftOutError as error:  # a process that ended while it was timed: the other sections are measured
                bench.results.leave_out(mine[0], "the rest", "", error)
