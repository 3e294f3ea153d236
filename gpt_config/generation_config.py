"""GenerationConfig: how to continue a prompt. It knows nothing of the model; limits that depend on one are checked there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from gpt_config.errors import ConfigError, InputTypeError
from gpt_config.validation import check_bool, check_real, check_seed, check_whole, plain_numbers


class GenerationOptions(TypedDict, total=False):
    """The fields of GenerationConfig as keyword arguments: `def generate(..., **options: Unpack[GenerationOptions])`."""

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    num_beams: int
    speculate: bool
    num_return_sequences: int
    stop: Sequence[str]
    stop_at_eot: bool
    seed: int | None


# What other programs call these options.
_OTHER_NAMES = {
    **dict.fromkeys(("max_tokens", "max_length", "max_completion_tokens", "max_gen_toks", "length"), "max_new_tokens"),
    **dict.fromkeys(("num_samples", "num_sample", "nsamples", "n"), "num_return_sequences"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "until"), "stop"),
    **dict.fromkeys(("sample", "sampling"), "do_sample"),
    **dict.fromkeys(("beams", "beam_size", "beam_width"), "num_beams"),
    **dict.fromkeys(("random_seed", "generator"), "seed"),
    "repeat_penalty": "repetition_penalty",
}
# Options of other programs that mean something else than any option here, however alike their names are.
_WITHOUT_EQUAL = {
    *("min_new_tokens", "min_tokens", "min_length", "length_penalty", "presence_penalty", "frequency_penalty", "best_of"),
    *("no_repeat_ngram_size", "encoder_repetition_penalty", "typical_p", "epsilon_cutoff", "eta_cutoff", "logit_bias"),
    *("num_beam_groups", "diversity_penalty", "penalty_alpha", "early_stopping", "bad_words_ids"),
}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How text is generated; the defaults decode greedily. Every field is validated on construction.

    >>> GenerationConfig(do_sample=True, temperature=0.7, top_k=40).greedy
    False
    """

    max_new_tokens: int = 100
    do_sample: bool = False  # False: always the most probable token
    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # sample among the k most probable tokens
    top_p: float | None = None  # ... among the fewest tokens whose probabilities reach p (Holtzman et al. 2019)
    min_p: float | None = None  # ... among tokens at least min_p times as probable as the best
    repetition_penalty: float = 1.0  # above 1 makes tokens that stand in the text less likely (Keskar et al. 2019)
    num_beams: int = 1  # above 1 is beam search
    speculate: bool = False  # guess tokens ahead and verify them together: the same text, sooner where it repeats itself
    num_return_sequences: int = 1  # continuations of each prompt
    stop: tuple[str, ...] = ()  # strings that end a continuation; they are not part of it
    stop_at_eot: bool = True  # end at the model's eos_token_id
    seed: int | None = None  # None draws one from the operating system

    @classmethod
    def of(
        cls, config: GenerationConfig | None, options: Mapping[str, Any], *, parameters: Sequence[str] = ()
    ) -> GenerationConfig:
        """`config`, or the defaults, with `options` in place of its fields.

        For an unknown option the ConfigError names the nearest field, or the nearest of the caller's own `parameters`.

        >>> GenerationConfig.of(None, {"max_tokens": 5})
        Traceback (most recent call last):
        gpt_config.errors.ConfigError: max_tokens=5 is not an option of generation: use max_new_tokens
        """
        if config is not None and not isinstance(config, GenerationConfig):
            raise InputTypeError(
                f"config must be a GenerationConfig, not {type(config).__name__}: give options by name, as max_new_tokens=20"
            )
        names = [field.name for field in fields(cls)]
        for name, value in options.items():
            if name not in names:
                import difflib  # here, because a right call needs none

                near = _OTHER_NAMES.get(name)
                if near is None and name not in _WITHOUT_EQUAL:
                    near = next(iter(difflib.get_close_matches(name, [*names, *parameters], 1)), None)
                remedy = f"use {near}" if near else f"there are {', '.join(names)}"
                raise ConfigError(f"{name}={value!r} is not an option of generation: {remedy}", field=name)
        return replace(config or cls(), **options)

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_whole("max_new_tokens", self.max_new_tokens, 0)
        check_whole("num_beams", self.num_beams, 1)
        check_whole("num_return_sequences", self.num_return_sequences, 1)
        if self.top_k is not None:
            check_whole("top_k", self.top_k, 1, " (leave it out for no limit)")
        if self.seed is not None:
            check_seed(self.seed)
        check_real("temperature", self.temperature, lambda t: t >= 0, "0 (greedy) or a positive number")
        if self.top_p is not None:
            check_real("top_p", self.top_p, lambda p: 0 < p <= 1, "above 0 and at most 1 (1 is no limit)")
        if self.min_p is not None:
            check_real("min_p", self.min_p, lambda p: 0 <= p <= 1, "between 0 (no limit) and 1")
        check_real("repetition_penalty", self.repetition_penalty, lambda r: r > 0, "positive (1 is no penalty)")
        check_bool("do_sample", self.do_sample)
        check_bool("speculate", self.speculate)
        check_bool("stop_at_eot", self.stop_at_eot)
        if not isinstance(self.stop, (tuple, list)):
            raise ConfigError(f"stop={self.stop!r} must be a tuple of strings, such as ('.', 'END')", field="stop")
        for stop in self.stop:
            if not isinstance(stop, str) or not stop:
                raise ConfigError(f"stop={stop!r} must be a text of at least one character", field="stop")
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        if self.do_sample:
            raise ConfigError(
                f"num_beams={self.num_beams} searches for the most probable text and do_sample draws at random: choose one",
                field="num_beams",
                other_fields=("do_sample",),
            )
        if self.speculate:
            raise ConfigError(
                f"num_beams={self.num_beams} follows several texts and speculate drafts how one continues: choose one",
                field="num_beams",
                other_fields=("speculate",),
            )
        if self.num_return_sequences > self.num_beams:
            raise ConfigError(
                f"num_return_sequences={self.num_return_sequences} is more than num_beams={self.num_beams}: "
                "a search returns at most one text per beam",
                field="num_return_sequences",
                other_fields=("num_beams",),
            )

    @property
    def greedy(self) -> bool:
        """True when each step takes the most probable token."""
        return not self.do_sample or self.temperature == 0
