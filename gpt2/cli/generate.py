"""`gpt2 generate`: parse the options, call `gpt2.generation`, print. generate.py at the root runs this command too."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from gpt2.cli.group import CONTEXT_SETTINGS, decode_argument, decode_utf8, read_stdin
from gpt2.cli.json_lines import json_line, json_option
from gpt2.cli.model_option import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, TOKENIZER_HELP, default_model, load_model_option
from gpt2.cli.options import Command, option, pass_options, revision_option, threads_option, wrong_options
from gpt2.weights.folder import locate_model
from gpt_config.errors import GPT2Warning, InputError
from gpt_config.generation_config import GenerationConfig, generation_settings
from gpt_config.model_config import GENERATION_FILE

if TYPE_CHECKING:
    from gpt2.generation.completion import Completion
    from gpt2.generation.steps import StepCounts
    from gpt2.pretrained import GPT2
    from gpt_encoder.interface import Tokenizer

_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "seed")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of `gpt2 generate`."""

    prompt: str | None
    prompt_file: str | None
    instruction: str | None
    instruction_input: str | None
    from_pretrained: str | None
    model_name: str | None
    max_tokens: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    num_beams: int
    num_samples: int
    seed: int | None
    stop: tuple[str, ...]
    speculate: bool
    draft_model: str | None
    device: str
    dtype: str
    batch_size: int
    stream: bool
    echo: bool
    as_json: bool
    verbose: bool


class _Loaded(NamedTuple):
    """The model with its tokenizer and the name that it was loaded by, and the draft model if one was given."""

    model: GPT2
    tokenizer: Tokenizer
    name: str
    draft_model: GPT2 | None
    steps: StepCounts  # counts the steps of generation


_EXAMPLES = """\b
Examples:
  gpt2 generate "Once upon a time" --do_sample --temperature 0.7 --seed 1
  gpt2 generate --file prompts.txt --max_tokens 20 --stop "." --json
  echo "The answer is" | gpt2 generate - --no_echo --speculate
"""
# Options under the headings of --help.
_prompt, _sampling = partial(option, group="Prompt and model"), partial(option, group="Sampling and length")
_speed, _output = partial(option, group="Speed"), partial(option, group="Output")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS, epilog=_EXAMPLES)
@click.argument("prompt", required=False)
@_prompt("--file", "prompt_file", metavar="FILE", help="Continue each line of FILE instead of PROMPT.")
@_prompt("--instruction", metavar="TEXT", help="Ask a model that gpt2 finetune taught to respond, instead of PROMPT.")
@_prompt("--input", "instruction_input", metavar="TEXT", help="The text that --instruction is about.")
@_prompt("--from_pretrained", metavar="NAME", help=MODEL_HELP)
@revision_option("Prompt and model")
@_prompt("--model_name", metavar="NAME", help=TOKENIZER_HELP)
@_sampling("--max_tokens", type=int, default=100, show_default=True, help="Generate at most this many tokens.")
@_sampling("--do_sample", is_flag=True, help="Draw tokens at random. Without it: the most probable token (greedy).")
@_sampling(
    "--temperature", type=float, default=1.0, show_default=True, help="Below 1 is safer, above 1 more varied; 0 is greedy."
)
@_sampling("--top_k", type=int, help="Draw among the k most probable tokens.  [default: all]")
@_sampling("--top_p", type=float, help="Draw among the fewest tokens whose probabilities reach p.  [default: all]")
@_sampling("--min_p", type=float, help="Draw among tokens at least p times as probable as the best.  [default: all]")
@_sampling(
    "--repetition_penalty", type=float, default=1.0, show_default=True, help="Above 1 makes tokens of the text less likely."
)
@_sampling(
    "--num_beams", type=int, default=1, show_default=True, help="Search for the most probable text with this many beams."
)
@_sampling("--num_samples", type=int, default=1, show_default=True, help="Continuations of each prompt.")
@_sampling("--seed", type=int, help="The same seed gives the same samples.  [default: a random one]")
@_sampling("--stop", multiple=True, metavar="TEXT", help="End before this text. May be given several times.")
@_speed("--speculate", is_flag=True, help="Draft tokens and verify several at once: the same text, faster if it repeats.")
@_speed("--draft_model", metavar="NAME", help="Draft with this smaller model of the same vocabulary: the same text.")
@threads_option("Speed")
@_speed("--device", default="auto", show_default=True, help=DEVICE_HELP)
@_speed("--dtype", default="float32", show_default=True, help=DTYPE_HELP)
@_speed("--batch_size", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts of --file to run at once.")
@_output("--stream/--no_stream", default=True, show_default=True, help="Print text as it is generated, or at the end.")
@_output("--echo/--no_echo", default=True, show_default=True, help="Print the prompt before its continuation.")
@json_option("one per continuation, with prompt, completion, ids, logprobs, finish_reason, sample, seed, model, timings")
@_output("--verbose", is_flag=True, help="Report dtype, device, threads and steps on stderr.")
@pass_options(GenerateOptions)
def generate(ctx: click.Context, options: GenerateOptions) -> None:
    """Continue a text, or respond to an instruction.

    PROMPT is the text to continue; "-" reads it from standard input, without its last line end. Only text goes to stdout;
    notes and errors go to stderr.
    """
    if options.instruction is None:
        if options.instruction_input is not None:
            raise click.UsageError("--input is the text that --instruction is about: give --instruction too")
        prompts = _read_prompts(options.prompt, options.prompt_file)
    else:
        prompts = [_instruction_prompt(options.instruction, options)]
        if ctx.get_parameter_source("echo") is not ParameterSource.COMMANDLINE:
            options = replace(options, echo=False)
    config = _generation_config(options)
    draft_folder = None if options.draft_model is None else locate_model(options.draft_model)
    model, tokenizer, name = load_model_option(
        options.from_pretrained, device=options.device, dtype=options.dtype, tokenizer_name=options.model_name
    )
    from gpt2.generation.steps import StepCounts

    loaded = _Loaded(model, tokenizer, name, _load_draft_model(draft_folder, options), StepCounts())
    _warn_of_unused_options(ctx, config)
    if options.verbose:
        click.echo(_how(model), err=True)
        if unapplied := _unapplied(model):
            click.echo(unapplied, err=True)
    if len(prompts) > options.batch_size:
        _print_batches(loaded, prompts, config, options)
    elif options.as_json:
        _print_json(loaded, prompts, config)
    else:
        _print_text(loaded, prompts, config, options)
    if options.verbose:
        click.echo(f"steps: {loaded.steps}", err=True)


def _how(model: GPT2) -> str:
    """One line on dtype, device and threads: what "auto" has chosen."""

    from gpt2.fast.threads import thread_report
    from gpt2.quantization.quantize import is_int8

    dtype = "int8 weights, float32" if is_int8(model) else str(model.dtype).removeprefix("torch.")
    threads = f", {thread_report()}" if model.device.type == "cpu" else ""
    return f"computing in {dtype} on {model.device}{threads}"


def _unapplied(model: GPT2) -> str:
    """One line with the settings of the model's generation_config.json, which the options do not take over; or ""."""
    from gpt2.weights.tokenizer import folder_of

    folder = folder_of(model)
    settings = {} if folder is None else generation_settings(folder)
    listed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return f"not applied, because options set how to generate: {listed} of {GENERATION_FILE}" if listed else ""


def _read_prompts(prompt: str | None, prompt_file: str | None) -> list[str]:
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give either a PROMPT (or - for standard input), --file FILE or --instruction TEXT")
    if prompt_file is not None:
        text = decode_utf8(Path(prompt_file).read_bytes(), prompt_file)
        if not text:
            raise InputError(f"{prompt_file} is empty: it needs at least one line, each a prompt")
        return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if prompt == "-":
        return [read_stdin()]
    assert prompt is not None
    return [decode_argument(prompt, "the prompt")]


def _instruction_prompt(instruction: str, options: GenerateOptions) -> str:
    """The instruction in the template that the model was trained with, which is in its folder."""
    if not instruction.strip():
        raise click.UsageError("--instruction is empty: say what to do")
    if options.prompt is not None or options.prompt_file is not None:
        raise click.UsageError("--instruction replaces PROMPT and --file: leave one out")
    from gpt2.finetuning.template import InstructionTemplate

    template = InstructionTemplate.load(locate_model(options.from_pretrained or default_model()))
    given = decode_argument(options.instruction_input or "", "--input")
    return template.prompt(decode_argument(instruction, "--instruction"), input=given)


def _generation_config(options: GenerateOptions) -> GenerationConfig:
    stop = tuple(decode_argument(text, "--stop") for text in options.stop)
    with wrong_options():
        return GenerationConfig(
            max_new_tokens=options.max_tokens,
            do_sample=options.do_sample,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            num_beams=options.num_beams,
            speculate=options.speculate or options.draft_model is not None,
            num_return_sequences=options.num_samples,
            stop=stop,
            seed=options.seed,
        )


def _warn_of_unused_options(ctx: click.Context, config: GenerationConfig) -> None:
    given = [name for name in _SAMPLING_OPTIONS if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given and not config.do_sample and not (given == ["temperature"] and config.temperature == 0):
        names = ", ".join(f"--{name}" for name in given)
        have = "has" if len(given) == 1 else "have"
        warnings.warn(f"{names} {have} no effect without --do_sample: nothing is drawn at random", GPT2Warning, 2)
    n_samples = config.num_return_sequences
    if n_samples > 1 and config.greedy and config.num_beams == 1:
        warnings.warn(f"--num_samples {n_samples} gives the same text each time: add --do_sample", GPT2Warning, 2)


def _load_draft_model(folder: Path | None, options: GenerateOptions) -> GPT2 | None:
    if folder is None:
        return None
    from gpt2.pretrained import load_model

    return load_model(folder, device=options.device, dtype=options.dtype)


def _print_json(loaded: _Loaded, prompts: list[str], config: GenerationConfig) -> None:
    from gpt2.generation.completion import complete

    completions = complete(
        loaded.model, loaded.tokenizer, prompts, config, draft_model=loaded.draft_model, on_step=loaded.steps
    )
    for completion in completions:
        click.echo(json_line(_as_dict(completion, loaded.name, one_by_one=config.num_beams == 1)))


def _as_dict(completion: Completion, name: str, *, one_by_one: bool) -> dict[str, Any]:
    decode_seconds = completion.seconds - completion.seconds_to_first_token
    has_speed = one_by_one and len(completion.ids) > 1 and decode_seconds > 0
    return {
        "prompt": completion.prompt,
        "completion": completion.text,
        "prompt_ids": completion.prompt_ids,
        "ids": completion.ids,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
        "sample": completion.index,
        "seed": completion.seed,
        "model": name,
        "timings": {
            "first_token_seconds": round(completion.seconds_to_first_token, 4),
            "seconds": round(completion.seconds, 4),
            "tokens_per_second": round((len(completion.ids) - 1) / decode_seconds, 2) if has_speed else None,
        },
    }


def _print_batches(loaded: _Loaded, prompts: list[str], config: GenerationConfig, options: GenerateOptions) -> None:
    """Print the texts of more prompts than a batch holds, in order, each as soon as it is done; with a bar on a terminal."""
    from tqdm.auto import tqdm

    from gpt2.generation.completion import complete_in_batches

    in_order = complete_in_batches(
        loaded.model,
        loaded.tokenizer,
        prompts,
        config,
        batch_size=options.batch_size,
        logprobs=options.as_json,
        draft_model=loaded.draft_model,
        on_step=loaded.steps,
    )
    with tqdm(total=len(prompts), unit="prompt", disable=None, leave=False, dynamic_ncols=True, file=sys.stderr) as bar:
        for place, completions in enumerate(in_order):
            bar.clear()
            for completion in completions:
                if options.as_json:
                    click.echo(json_line(_as_dict(completion, loaded.name, one_by_one=config.num_beams == 1)))
                    continue
                click.echo(_heading(place, len(prompts), completion.index), err=True)
                click.echo(completion.prompt * options.echo + completion.text)
            bar.update()


def _heading(place: int, n_prompts: int, sample: int) -> str:
    return f"== prompt {place + 1} of {n_prompts}, sample {sample + 1} =="


def _print_text(loaded: _Loaded, prompts: list[str], config: GenerationConfig, options: GenerateOptions) -> None:
    several = len(prompts) * config.num_return_sequences > 1
    for row, pieces in _texts_in_order(loaded, prompts, config):
        place, sample = divmod(row, config.num_return_sequences)
        if several:
            click.echo(_heading(place, len(prompts), sample), err=True)
        first = next(pieces, "")  # before the prompt is printed: if the model fails, stdout stays empty
        if options.echo:
            click.echo(prompts[place], nl=False)
        for piece in chain([first], pieces) if options.stream else [first + "".join(pieces)]:
            click.echo(piece, nl=False)
        click.echo()


def _texts_in_order(loaded: _Loaded, prompts: list[str], config: GenerationConfig) -> Iterator[tuple[int, Iterator[str]]]:
    """(row, its text in pieces) for each row in order.

    The pieces of a row come as they are generated, after those that were generated while earlier rows were read.
    """
    from gpt2.generation.completion import stream_batch

    n_rows = len(prompts) * config.num_return_sequences
    waiting: list[list[str]] = [[] for _ in range(n_rows)]
    ended = [False] * n_rows
    events = stream_batch(
        loaded.model, loaded.tokenizer, prompts, config, draft_model=loaded.draft_model, on_step=loaded.steps
    )

    def pieces(row: int) -> Iterator[str]:
        while True:
            yield from waiting[row]
            waiting[row].clear()
            if ended[row]:
                return
            other, piece, completion = next(events)
            waiting[other].append(piece)
            ended[other] = ended[other] or completion is not None

    for row in range(n_rows):
        yield row, pieces(row)
