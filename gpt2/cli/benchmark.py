"""`gpt2 benchmark`: parse the options, call `gpt2.benchmark`, print the table and the JSON. It measures nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2.benchmark.settings import DEFAULT_SECTIONS, DTYPES, PEERS, SECTIONS, Settings
from gpt2.benchmark.texts import texts_of
from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.json_lines import json_line, json_option
from gpt2.cli.options import Choice, Command, option, pass_options, wrong_options
from gpt2.weights.folder import locate_model
from gpt_config.cores import process_limit
from gpt_config.model_config import PRESETS

if TYPE_CHECKING:
    from gpt2.benchmark.results import Results

_DEFAULTS = Settings()


def _listed(name: str, help_text: str, default: tuple[Any, ...], *more_names: str, group: str) -> Callable[..., Any]:
    """An option that takes a list with commas, and may be given several times."""
    text = f"{help_text}  [default: {','.join(map(str, default))}]"
    return option(f"--{name}", name, *more_names, multiple=True, metavar="LIST", group=group, help=text)


# Options under the headings of --help.
_what, _model = partial(option, group="What to measure"), partial(option, group="Model and text")
_lists = partial(_listed, group="What to measure")
_sizes, _size_lists = partial(option, group="Sizes"), partial(_listed, group="Sizes")
_speed, _output = partial(option, group="Speed"), partial(option, group="Output")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """The options of `gpt2 benchmark`. Lists are as the user wrote them: texts with commas."""

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
    as_json: bool


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@_model("--from_pretrained", metavar="NAME", help="Measure with this model.  [default: random weights]")
@_model(
    "--preset",
    type=Choice(PRESETS),
    metavar="NAME",
    help="Size of the random weights: gpt2, gpt2-xl, 355M ...  [default: gpt2]",
)
@_model("--seed", type=int, default=0, show_default=True, help="Seed of the random weights.")
@_lists("sections", f"Sections to measure: {', '.join(SECTIONS)}.", DEFAULT_SECTIONS, "--section")
@_lists("peers", 'Packages to compare with; "none" measures this package alone.', PEERS, "--peer")
@_lists("dtypes", "Precisions of the weights.", tuple(DTYPES), "--dtype")
@_speed("--threads", type=int, help="Threads of each engine.  [default: one per core]")
@_speed("--beside", type=int, default=_DEFAULTS.beside, show_default=True, help="Keep N cores busy with other processes.")
@_speed("--device", default=_DEFAULTS.device, show_default=True, help="Device of the models: cpu, cuda, cuda:1.")
@_what("--rounds", type=int, default=_DEFAULTS.rounds, show_default=True, help="Timed turns of each engine.")
@_sizes(
    "--prompt_tokens",
    type=int,
    default=_DEFAULTS.prompt_tokens,
    show_default=True,
    help="decode, batch: tokens of a prompt.",
)
@_sizes("--new_tokens", type=int, default=_DEFAULTS.new_tokens, show_default=True, help="decode, batch: tokens to generate.")
@_size_lists("prefill_tokens", "prefill: tokens of a prompt.", _DEFAULTS.prefill_tokens)
@_size_lists("batch_sizes", "batch: rows.", _DEFAULTS.batch_sizes)
@_sizes("--train_rows", type=int, default=_DEFAULTS.train_rows, show_default=True, help="training: rows of a step.")
@_sizes("--train_context", type=int, default=_DEFAULTS.train_context, show_default=True, help="training: tokens of a row.")
@_sizes(
    "--dropout", type=float, default=_DEFAULTS.dropout, show_default=True, help="training: share of activations dropped."
)
@_speed("--compile", is_flag=True, help="training: run this package and transformers with torch.compile.")
@_size_lists("sizes", "scaling: presets or names of models.", _DEFAULTS.sizes)
@_size_lists("contexts", "scaling: tokens in the cache.", _DEFAULTS.contexts)
@_model("--text", metavar="FILE", help="Text of the tokenizers and prompts.  [default: Python's standard library]")
@_output("--plot", "plot_file", metavar="FILE", help="Draw the results into a .png, .svg or .pdf file.")
@json_option("one with model, environment, settings, peers, memory, rows and left_out. Without --json it follows the table")
@pass_options(BenchmarkOptions)
def benchmark(ctx: click.Context, options: BenchmarkOptions) -> None:
    """Compare speed with the peers that are installed.

    All engines have the same weights, prompts and threads, take turns, and must return the same tokens before they are
    timed. stdout has a table, then one line of JSON. On a GPU (--device cuda) transformers is the only peer. The section
    "scaling" takes minutes and gigabytes and is not among the defaults: gpt2 benchmark --sections scaling --peers none
    --dtypes float32
    """
    settings = _settings(options)
    if options.from_pretrained is not None and options.preset is not None:
        raise click.UsageError("--preset is for random weights: leave out --preset or --from_pretrained")
    preset = options.preset or "gpt2"
    if options.from_pretrained is not None:
        locate_model(options.from_pretrained)  # before torch is imported
    texts = texts_of(options.text)
    from gpt2.benchmark.report import check_plot, plot, table
    from gpt2.benchmark.run import run_benchmark

    picture = Path(options.plot_file) if options.plot_file is not None else None
    if picture is not None:
        check_plot(picture)

    def show(results: Results, *, err: bool = False) -> None:
        for line in [] if options.as_json else table(results):
            click.echo(line, err=err)
        click.echo(json_line({"model": results.settings["model"], **results.to_dict()}), err=err)

    def show_unfinished(results: Results) -> None:
        try:
            show(results)
        except OSError:  # the same Ctrl-C ended the reader of stdout, as in `gpt2 benchmark | tee log`
            show(results, err=True)
        if picture is not None:
            plot(results, picture)

    results = run_benchmark(
        settings, options.from_pretrained, preset, texts, lambda line: click.echo(line, err=True), show_unfinished,
        parts=ctx.obj,
    )  # fmt: skip
    show(results)
    if picture is not None:  # last, because the figures are printed even if the picture cannot be written
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
    """The names in lists with commas, without duplicates; `default` if the option was not given."""
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
