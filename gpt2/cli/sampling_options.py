"""The options that say how, and how fast, text is generated, for every command that generates, and their config."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import click

from gpt2.cli.group import decode_argument
from gpt2.cli.model_option import DEVICE_HELP, DTYPE_HELP
from gpt2.cli.option_sources import was_given
from gpt2.cli.options import Choice, option, options_together, threads_option, wrong_options
from gpt_config.errors import GPT2Warning
from gpt_config.generation_config import EarlyStopping, GenerationConfig

_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
# The values of --early_stopping, and what they are in a config.
EARLY_STOPPING: dict[str, EarlyStopping] = {"false": False, "true": True, "never": "never"}
_BEAM_OPTIONS = ("length_penalty", "early_stopping")
_sampling, _end = partial(option, group="Sampling"), partial(option, group="Length and end")
_control, _beams = partial(option, group="Penalties and bans"), partial(option, group="Beam search")
_speed = partial(option, group="Speed")

# The options of `SamplingOptions`.
sampling_options = options_together(
    _end("--max_tokens", type=int, default=100, show_default=True, help="Generate at most this many tokens."),
    _end("--min_tokens", type=int, default=0, help="Do not end before this many tokens.  [default: 0]"),
    _end("--max_time", type=float, metavar="SECONDS", help="End with the first token after this time."),
    _end("--stop", multiple=True, metavar="TEXT", help="End before this text. May be given several times."),
    _end("--eos_token_id", type=int, multiple=True, metavar="ID", help="End at this token; several times for several."),
    _end("--ignore_eot", is_flag=True, help="Continue after the end token."),
    _end("--num_samples", type=int, default=1, show_default=True, help="Continuations of each prompt."),
    _sampling("--do_sample", is_flag=True, help="Draw tokens at random. Without it: the most probable token (greedy)."),
    _sampling(
        "--temperature",
        type=float,
        default=1.0,
        show_default=True,
        help="Below 1 is safer, above 1 more varied; 0 is greedy.",
    ),
    _sampling("--top_k", type=int, help="Draw among the k most probable tokens; 0 is all.  [default: all]"),
    _sampling("--top_p", type=float, help="Draw among the fewest tokens whose probabilities reach p.  [default: all]"),
    _sampling("--min_p", type=float, help="Draw among tokens at least p times as probable as the best.  [default: all]"),
    _sampling("--typical_p", type=float, help="Draw among the tokens nearest the entropy that reach p.  [default: all]"),
    _sampling("--seed", type=int, help="The same seed gives the same samples.  [default: a random one]"),
    _control(
        "--repetition_penalty",
        type=float,
        default=1.0,
        show_default=True,
        help="Above 1 makes tokens of the text less likely.",
    ),
    _control("--frequency_penalty", type=float, default=0.0, help="Subtract this per time that the new text has a token."),
    _control("--presence_penalty", type=float, default=0.0, help="Subtract this once for a token of the new text."),
    _control("--penalty_window", type=int, metavar="N", help="Count the last N tokens only.  [default: all]"),
    _control("--no_repeat_ngram_size", type=int, default=0, metavar="N", help="Repeat no sequence of N tokens."),
    _control("--logit_bias", multiple=True, metavar="ID=BIAS", help="Add to the logit of a token; -inf excludes it."),
    _control("--bad_words", multiple=True, metavar="TEXT", help="Do not generate this text. May be given several times."),
    _beams(
        "--num_beams",
        type=int,
        default=1,
        show_default=True,
        help="Search for the most probable text with this many beams.",
    ),
    _beams("--length_penalty", type=float, default=1.0, show_default=True, help="Above 0 favours longer texts."),
    _beams(
        "--early_stopping",
        type=Choice(list(EARLY_STOPPING)),
        default="false",
        show_default=True,
        help="When a search ends that has found enough texts.",
    ),
)
# --speculate, --draft_model, --threads, --device and --dtype.
speed_options = options_together(
    _speed(
        "--speculate", is_flag=True, help="Draft tokens and verify several at once: the same text, faster if it repeats."
    ),
    _speed("--draft_model", metavar="NAME", help="Draft with this smaller model of the same vocabulary: the same text."),
    threads_option("Speed"),
    _speed("--device", default="auto", show_default=True, help=DEVICE_HELP),
    _speed("--dtype", default="float32", show_default=True, help=DTYPE_HELP),
)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The values of `sampling_options`."""

    max_tokens: int
    min_tokens: int
    max_time: float | None
    stop: tuple[str, ...]
    eos_token_id: tuple[int, ...]
    ignore_eot: bool
    num_samples: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    seed: int | None
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    penalty_window: int | None
    no_repeat_ngram_size: int
    logit_bias: tuple[str, ...]
    bad_words: tuple[str, ...]
    num_beams: int
    length_penalty: float
    early_stopping: str

    def generation_config(self, **fields: Any) -> GenerationConfig:
        """The config that these options and `fields` make. Raises UsageError, which names the option, for wrong values."""
        same = {field.name for field in dataclasses.fields(GenerationConfig)}
        values = {name: value for name, value in vars(self).items() if name in same}
        values |= {
            "max_new_tokens": self.max_tokens,
            "min_new_tokens": self.min_tokens,
            "num_return_sequences": self.num_samples,
            "stop_at_eot": not self.ignore_eot,
            "stop": tuple(decode_argument(text, "--stop") for text in self.stop),
            "bad_words": tuple(decode_argument(text, "--bad_words") for text in self.bad_words),
            "logit_bias": dict(map(_id_and_bias, self.logit_bias)),
            "eos_token_id": self.eos_token_id or None,
            "early_stopping": EARLY_STOPPING[self.early_stopping],
        }
        with wrong_options():
            return GenerationConfig(**{**values, **fields})


def _id_and_bias(text: str) -> tuple[int, float]:
    token, _, number = text.partition("=")
    try:
        return int(token), float(number)
    except ValueError:
        message = f"--logit_bias={text!r} must be ID=BIAS, such as 50256=-5 (-inf excludes the token)"
        raise click.UsageError(message) from None


def warn_of_unused_options(ctx: click.Context, config: GenerationConfig) -> None:
    """Warn of options that were given and change nothing."""

    def given(names: tuple[str, ...]) -> list[str]:
        return [name for name in names if was_given(ctx, name)]

    def warn(names: list[str], reason: str) -> None:
        have = "has" if len(names) == 1 else "have"
        warnings.warn(f"{', '.join(f'--{name}' for name in names)} {have} no effect without {reason}", GPT2Warning, 3)

    of_sampling = given(_SAMPLING_OPTIONS)
    if of_sampling and not config.do_sample and not (of_sampling == ["temperature"] and config.temperature == 0):
        warn(of_sampling, "--do_sample: nothing is drawn at random")
    if config.num_beams == 1 and (of_beams := given(_BEAM_OPTIONS)):
        warn(of_beams, "--num_beams")
    has_penalty = config.repetition_penalty != 1 or config.frequency_penalty or config.presence_penalty
    if config.penalty_window is not None and not has_penalty:
        warn(["penalty_window"], "a penalty")
    if config.top_logprobs and not ctx.params.get("as_json"):
        warn(["top_logprobs"], "--json")
    n_samples = config.num_return_sequences
    if n_samples > 1 and config.greedy and config.num_beams == 1:
        warnings.warn(f"--num_samples {n_samples} gives the same text each time: add --do_sample", GPT2Warning, 2)
