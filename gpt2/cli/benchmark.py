"""`gpt2 benchmark`: parse the options, call `gpt2.benchmark`, print the table and the JSON. It measures nothing itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2.benchmark.settings import DEFAULT_SECTIONS, DTYPES, PEERS, SECTIONS, Settings
from gpt2.benchmark.texts import texts_of
from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.options import Command, pass_options, wrong_options
from gpt2.weights.folder import locate_model
from gpt_config.cores import process_limit
from gpt_config.model_config import PRESETS

if TYPE_CHECKING:
    from gpt2.benchmark.results import Results

_DEFAULTS = Settings()


def _listed(name: str, help_text: str, default: tuple[Any, ...], *more_names: str) -> Callable[..., Any]:
    """An option that takes a list with commas, and may be given several times."""
    shown = ",".join(map(str, default))
    return click.option(
        f"--{name}", name, *more_names, multiple=True, metavar="LIST", help=f"{help_text}  [default: {shown}]"
    )


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """The options of `gpt2 benchmark`. Lists are as they were given: texts with commas."""

    from_pretrained: str | None
    preset: str | None
    seed: int
    sections: tuple[str, ...]
    peers: tuple[str, ...]
    dtypes: tuple[str, ...]
    threads: int | None
    device: str
    beside: int
    rounds: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens: tuple[str, ...]
    batch_sizes: tuple[str, ...]
    train_rows: int
    train_context: int
    dropout: float
    compile: bool
    sizes: tuple[str, ...]
    contexts: tuple[str, ...]
    text: str | None
    plot_file: str | None


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.option("--from_pretrained", metavar="NAME", help="Measure with this model instead of random weights.")
@click.option("--preset", metavar="NAME", help="The shape of random weights: gpt2, gpt2-xl, 355M ...  [default: gpt2]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random weights.")
@_listed("sections", f"What to measure: {', '.join(SECTIONS)}.", DEFAULT_SECTIONS, "--section")
@_listed("peers", 'With whom; "none" is this package alone.', PEERS, "--peer")
@_listed("dtypes", "Precisions of the weights.", tuple(DTYPES), "--dtype")
@click.option("--threads", type=int, help="Of every engine.  [default: the cores there are]")
@click.option("--device", default=_DEFAULTS.device, show_default=True, help="Where models compute: cpu, cuda, cuda:1.")
@click.option(
    "--beside", type=int, default=_DEFAULTS.beside, show_default=True, help="Processes that keep a core busy meanwhile."
)
@click.option("--rounds", type=int, default=_DEFAULTS.rounds, show_default=True, help="Timed turns of each.")
@click.option("--prompt_tokens", type=int, default=_DEFAULTS.prompt_tokens, show_default=True, help="Of decode and batch.")
@click.option("--new_tokens", type=int, default=_DEFAULTS.new_tokens, show_default=True, help="Of decode and batch.")
@_listed("prefill_tokens", "Lengths of prompts.", _DEFAULTS.prefill_tokens)
@_listed("batch_sizes", "Rows of a batch.", _DEFAULTS.batch_sizes)
@click.option("--train_rows", type=int, default=_DEFAULTS.train_rows, show_default=True, help="Rows of a training step.")
@click.option("--train_context", type=int, default=_DEFAULTS.train_context, show_default=True, help="Tokens of such a row.")
@click.option("--dropout", type=float, default=_DEFAULTS.dropout, show_default=True, help="In training.")
@click.option("--compile", is_flag=True, help="Training by torch.compile, ours and transformers'.")
@_listed("sizes", "Of scaling: presets, or names of models.", _DEFAULTS.sizes)
@_listed("contexts", "Of scaling: tokens.", _DEFAULTS.contexts)
@click.option("--text", metavar="FILE", help="For the tokenizers and prompts.  [default: Python's standard library]")
@click.option("--plot", "plot_file", metavar="FILE", help="Draw it: a .png, .svg or .pdf.")
@pass_options(BenchmarkOptions)
def benchmark(ctx: click.Context, options: BenchmarkOptions) -> None:
    """Measure this package beside those of its peers that are installed, on the same weights, prompts and threads.

    All take turns, and must give the same tokens before they are timed. The table goes to standard output, and after it
    one line of JSON. On a GPU, --device cuda, only transformers takes part. The section "scaling" takes minutes and
    gigabytes, and must be asked for: gpt2 benchmark --sections scaling --peers none --dtypes float32
    """
    settings = _settings(options)
    if options.from_pretrained is not None and options.preset is not None:
        raise click.UsageError("--preset is for random weights: leave it or --from_pretrained out")
    preset = options.preset or "gpt2"
    if preset not in PRESETS:
        raise click.UsageError(f"--preset {preset!r} is unknown: there are {', '.join(PRESETS)}")
    if options.from_pretrained is not None:
        locate_model(options.from_pretrained)  # before torch is imported
    texts = texts_of(options.text)
    from gpt2.benchmark.report import check_plot, plot, table
    from gpt2.benchmark.run import run_benchmark

    picture = Path(options.plot_file) if options.plot_file is not None else None
    if picture is not None:
        check_plot(picture)

    def show(results: Results, *, err: bool = False) -> None:
        for line in table(results):
            click.echo(line, err=err)
        click.echo(json.dumps(results.to_dict()), err=err)

    def show_unfinished(results: Results) -> None:
        try:
            show(results)
        except OSError:  # whoever read it was ended by the same Ctrl-C, as in `gpt2 benchmark | tee log`
            show(results, err=True)
        if picture is not None:
            plot(results, picture)

    results = run_benchmark(
        settings, options.from_pretrained, preset, texts, lambda line: click.echo(line, err=True), show_unfinished,
        parts=ctx.obj,
    )  # fmt: skip
    show(results)
    if picture is not None:  # last: if it cannot be written, an hour's figures are not lost
        plot(results, picture)


def _settings(options: BenchmarkOptions) -> Settings:
    peers = _chosen(options.peers, _DEFAULTS.peers)
    with wrong_options():
        return Settings(
            sections=_chosen(options.sections, _DEFAULTS.sections),
            peers=() if peers == ("none",) else peers,
            dtypes=_chosen(options.dtypes, _DEFAULTS.dtypes),
            threads=process_limit().count if options.threads is None else options.threads,
            device=options.device,
            beside=options.beside,
            rounds=options.rounds,
            seed=options.seed,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            prefill_tokens=_numbers("prefill_tokens", options.prefill_tokens, _DEFAULTS.prefill_tokens),
            batch_sizes=_numbers("batch_sizes", options.batch_sizes, _DEFAULTS.batch_sizes),
            train_rows=options.train_rows,
            train_context=options.train_context,
            dropout=options.dropout,
            compile=options.compile,
            sizes=_chosen(options.sizes, _DEFAULTS.sizes),
            contexts=_numbers("contexts", options.contexts, _DEFAULTS.contexts),
        )


def _chosen(given: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    """The names in lists with commas, each once; the default if the option was not given."""
    if not given:
        return default
    return tuple(dict.fromkeys(name.strip() for value in given for name in value.split(",") if name.strip()))


def _numbers(option: str, given: tuple[str, ...], default: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_whole(option, value) for value in _chosen(given, ())) if given else default


def _whole(option: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise click.UsageError(f"--{option}={value!r} must be whole numbers with commas between them") from None
