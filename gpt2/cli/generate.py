"""`gpt2 generate`: parse the options, call `gpt2.generation`, print. generate.py at the root runs this command too."""

from __future__ import annotations

import secrets
import warnings
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpt2.cli.chat import ChatOptions, converse, is_on_a_terminal
from gpt2.cli.generate_output import Layout, Loaded, write_results
from gpt2.cli.generate_tasks import check_tasks, settings_of, tasks_of
from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.json_lines import json_option
from gpt2.cli.model_option import MODEL_HELP, TOKENIZER_HELP, load_model_option
from gpt2.cli.option_sources import was_given
from gpt2.cli.options import (
    Command,
    option,
    options_from,
    pass_options,
    revision_option,
    values_of,
)
from gpt2.cli.output_file import OutputFile
from gpt2.cli.prompts import (
    Prompt,
    argument_prompt,
    file_prompts,
    has_escapes,
    instruction_prompt,
    is_json_name,
    unescape,
)
from gpt2.cli.sampling_options import SamplingOptions, sampling_options, speed_options, warn_of_unused_options
from gpt2.weights.folder import locate_model
from gpt_config.errors import GPT2Warning
from gpt_config.generation_config import GenerationConfig, generation_settings
from gpt_config.model_config import GENERATION_FILE

if TYPE_CHECKING:
    from gpt2.pretrained import GPT2


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions):
    """The options of `gpt2 generate`."""

    prompt: str | None
    prompt_file: str | None
    field: str | None
    instruction: str | None
    instruction_input: str | None
    from_pretrained: str | None
    model_name: str | None
    special_tokens: bool
    escape: bool
    speculate: bool
    draft_model: str | None
    device: str
    dtype: str
    batch_size: int
    stream: bool
    echo: bool
    out: str | None
    as_json: bool
    top_logprobs: int
    verbose: bool


_EXAMPLES = """\b
Examples:
  gpt2 generate "Once upon a time" --do_sample --temperature 0.7 --seed 1
  gpt2 generate --file prompts.txt --max_tokens 20 --stop "." --json
  echo "The answer is" | gpt2 generate - --no_echo --speculate
"""
# Options under the headings of --help.
_prompt = partial(option, group="Prompt and model")
_speed, _output = partial(option, group="Speed"), partial(option, group="Output")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS, epilog=_EXAMPLES)
@click.argument("prompt", required=False)
@_prompt("--file", "prompt_file", metavar="FILE", help="Continue each line of FILE, text or JSONL; - is standard input.")
@_prompt("--field", metavar="NAME", help="The field of a JSONL --file that has the prompt.  [default: prompt, or text]")
@_prompt("--instruction", metavar="TEXT", help="Ask a model that gpt2 finetune taught to respond, instead of PROMPT.")
@_prompt("--input", "instruction_input", metavar="TEXT", help="The text that --instruction is about.")
@_prompt("--from_pretrained", metavar="NAME", help=MODEL_HELP)
@revision_option("Prompt and model")
@_prompt("--model_name", metavar="NAME", help=TOKENIZER_HELP)
@_prompt(
    "--special_tokens", is_flag=True, help="Read <|endoftext|> and other special tokens in prompts as such, not as text."
)
@_prompt("--escape", is_flag=True, help=r"Read \n, \t, \r and \\ in PROMPT, lines of --file and --stop as characters.")
@sampling_options
@speed_options
@_speed("--batch_size", type=click.IntRange(min=1), default=8, show_default=True, help="Most texts to run at once.")
@_output("--stream/--no_stream", default=True, show_default=True, help="Print text as it is generated, or at the end.")
@_output("--echo/--no_echo", default=True, show_default=True, help="Print the prompt before its continuation.")
@_output("--out", metavar="FILE", help="Write to FILE as results come. The same command goes on after an interruption.")
@json_option("one per continuation, with prompt, completion, ids, logprobs, finish_reason, sample, seed, model, timings")
@_output("--top_logprobs", type=int, default=0, metavar="N", help="With --json: the N best tokens of each step.")
@_output("--verbose", is_flag=True, help="Report dtype, device, threads and steps on stderr.")
@pass_options(GenerateOptions)
def generate(ctx: click.Context, options: GenerateOptions) -> None:
    """Continue a text, or respond to an instruction.

    PROMPT is the text to continue; "-" reads it from standard input, without its last line end. Without a prompt, on a
    terminal, it is gpt2 chat. Only text goes to stdout; notes and errors go to stderr.
    """
    if _is_a_chat(options):
        converse(ctx, options_from(ChatOptions, {**values_of(options), "system": "", "plain": False}))
        return
    prompts = _prompts(options)
    if options.instruction is not None and not was_given(ctx, "echo"):
        options = replace(options, echo=False)
    if options.escape:
        prompts = [replace(prompt, text=unescape(prompt.text)) for prompt in prompts] if not prompts[0].is_json else prompts
        options = replace(options, stop=tuple(map(unescape, options.stop)))
    out = None if options.out is None else OutputFile(options.out)
    options = _with_seed(options, out)
    speculate = options.speculate or options.draft_model is not None
    config = options.generation_config(speculate=speculate, top_logprobs=options.top_logprobs)
    tasks = tasks_of(prompts, options, config)
    draft_folder = None if options.draft_model is None else locate_model(options.draft_model)
    model, tokenizer, name = load_model_option(
        options.from_pretrained, device=options.device, dtype=options.dtype, tokenizer_name=options.model_name
    )
    from gpt2.generation.steps import StepCounts

    loaded = Loaded(model, tokenizer, name, _load_draft_model(draft_folder, options), StepCounts())
    layout = Layout(
        as_json=options.as_json or is_json_name(options.out or ""),
        echo=options.echo,
        stream=options.stream,
        special_tokens=options.special_tokens,
        batch_size=options.batch_size,
    )
    check_tasks(loaded, tasks, layout)
    if out is not None:
        ctx.call_on_close(out.close)
        out.begin(settings_of(loaded, tasks, config, layout))
    _warn(ctx, options, config)
    if options.verbose:
        click.echo(_how(model), err=True)
        if unapplied := _unapplied(model):
            click.echo(unapplied, err=True)
    if out is not None and out.n_done == len(tasks):
        click.echo(f"{options.out} is complete: it has the results of all prompts ({len(tasks)})", err=True)
    else:
        write_results(loaded, tasks, layout, out)
    if options.verbose:
        click.echo(f"steps: {loaded.steps}", err=True)


def _is_a_chat(options: GenerateOptions) -> bool:
    given = (options.prompt, options.prompt_file, options.instruction, options.instruction_input, options.out)
    return all(text is None for text in given) and options.num_samples == 1 and not options.as_json and is_on_a_terminal()


def _prompts(options: GenerateOptions) -> list[Prompt]:
    if options.instruction is not None:
        if options.prompt is not None or options.prompt_file is not None:
            raise click.UsageError("--instruction replaces PROMPT and --file: leave one out")
        return [instruction_prompt(options.instruction, options.instruction_input, options.from_pretrained)]
    if options.instruction_input is not None:
        raise click.UsageError("--input is the text that --instruction is about: give --instruction too")
    if options.field is not None and options.prompt_file is None:
        raise click.UsageError("--field is the field of --file that has the prompt: give --file too")
    if options.prompt_file is not None and options.prompt is None:
        names = [field.name for field in fields(SamplingOptions)]
        return file_prompts(options.prompt_file, options.field, names)
    if options.prompt is None or options.prompt_file is not None:
        raise click.UsageError("give either a PROMPT (or - for standard input), --file FILE or --instruction TEXT")
    return [argument_prompt(options.prompt)]


def _with_seed(options: GenerateOptions, out: OutputFile | None) -> GenerateOptions:
    """The options with a seed, so that all prompts have the same one: the one that an earlier run into `out` has drawn."""
    if options.seed is not None:
        return options
    drawn = None if out is None or out.begun_with is None else out.begun_with.get("seed")
    return replace(options, seed=drawn if isinstance(drawn, int) else secrets.randbits(31))


def _warn(ctx: click.Context, options: GenerateOptions, config: GenerationConfig) -> None:
    warn_of_unused_options(ctx, config)
    if not options.escape and (stop := next(filter(has_escapes, options.stop), None)):
        warnings.warn(
            f"--stop {stop!r} has a backslash, which is not read as a line end or a tab: add --escape", GPT2Warning, 2
        )


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


def _load_draft_model(folder: Path | None, options: GenerateOptions) -> GPT2 | None:
    if folder is None:
        return None
    from gpt2.pretrained import load_model

    return load_model(folder, device=options.device, dtype=options.dtype)
