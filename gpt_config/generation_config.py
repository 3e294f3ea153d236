"""GenerationConfig: how a prompt is continued. It knows nothing of the model, which checks the limits that depend on it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from gpt_config.errors import ConfigError, GPT2Warning, InputTypeError
from gpt_config.model_config import GENERATION_FILE, read_generation_file
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


# Other programs' names for these options.
_OTHER_NAMES = {
    **dict.fromkeys(("max_tokens", "max_length", "max_completion_tokens", "max_gen_toks", "length"), "max_new_tokens"),
    **dict.fromkeys(("num_samples", "num_sample", "nsamples", "n"), "num_return_sequences"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "until"), "stop"),
    **dict.fromkeys(("sample", "sampling"), "do_sample"),
    **dict.fromkeys(("beams", "beam_size", "beam_width"), "num_beams"),
    **dict.fromkeys(("random_seed", "generator"), "seed"),
    "repeat_penalty": "repetition_penalty",
}
# Options of other programs that have no equivalent here. No option is suggested for them, even if its name is similar.
_WITHOUT_EQUAL = {
    *("min_new_tokens", "min_tokens", "min_length", "length_penalty", "presence_penalty", "frequency_penalty", "best_of"),
    *("no_repeat_ngram_size", "encoder_repetition_penalty", "typical_p", "epsilon_cutoff", "eta_cutoff", "logit_bias"),
    *("num_beam_groups", "diversity_penalty", "penalty_alpha", "early_stopping", "bad_words_ids"),
}

# The settings of a generation_config.json that are fields here, by their names there.
_FIELDS = {
    **{
        name: name
        for name in (
            *("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p"),
            *("repetition_penalty", "num_beams", "num_return_sequences"),
        )
    },
    "stop_strings": "stop",
}
# What transformers applies if `do_sample` is true and no `top_k` is stated.
_TRANSFORMERS_TOP_K = 50
# Values in a generation_config.json that change nothing. Keys with None say what is returned, or how it is computed.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("do_sample", "early_stopping", "renormalize_logits", "remove_invalid_values"), False),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "length_penalty"), 1.0),
    **dict.fromkeys(("encoder_repetition_penalty", "num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_p"), 0.0),
    "max_length": 20,
    "top_k": 50,
}
_NOT_SETTINGS = {
    *("_from_model_config", "transformers_version", "use_cache", "return_dict_in_generate"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
}


def generation_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in the `generation_config.json` of a folder that change how transformers generates, by their names there.

    Empty if there is no such file. End tokens are not among them. Raises ConfigError for a damaged file.
    """
    path = Path(folder) / GENERATION_FILE
    values = read_generation_file(path) if path.is_file() else {}
    return {
        name: value
        for name, value in values.items()
        if name not in _NOT_SETTINGS and value is not None and (name not in _NEUTRAL or _NEUTRAL[name] != value)
    }


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How text is generated. By default decoding is greedy. Every field is validated on construction.

    >>> GenerationConfig(do_sample=True, temperature=0.7, top_k=40).greedy
    False
    """

    max_new_tokens: int = 100
    do_sample: bool = False  # False: always take the most probable token
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None  # sample from the k most probable tokens
    top_p: float | None = None  # ... from the fewest tokens whose probabilities sum to p or more (Holtzman et al. 2019)
    min_p: float | None = None  # ... from tokens at least min_p times as probable as the most probable one
    repetition_penalty: float = 1.0  # above 1: tokens already in the text become less likely (Keskar et al. 2019)
    num_beams: int = 1  # above 1: beam search
    speculate: bool = False  # draft tokens and verify them together: the same text, faster if the text repeats itself
    num_return_sequences: int = 1  # continuations per prompt
    stop: tuple[str, ...] = ()  # strings that end a continuation; they are not part of it
    stop_at_eot: bool = True  # end at the model's eos_token_id
    seed: int | None = None  # None: drawn from the operating system

    @classmethod
    def of(
        cls, config: GenerationConfig | None, options: Mapping[str, Any], *, parameters: Sequence[str] = ()
    ) -> GenerationConfig:
        """`config` (None: the defaults) with the fields in `options` replaced.

        Raises ConfigError for an unknown option. It suggests the field, or one of the caller's `parameters`, with the most
        similar name. Raises InputTypeError if `config` is not a GenerationConfig.

        >>> GenerationConfig.of(None, {"max_tokens": 5})
        Traceback (most recent call last):
        gpt_config.errors.ConfigError: max_tokens=5 is not an option of generation: use max_new_tokens
        """
        if config is not None and not isinstance(config, GenerationConfig):
            raise InputTypeError(
                f"config must be a GenerationConfig, not {type(config).__name__}: "
                "pass options by name, such as max_new_tokens=20"
            )
        names = [field.name for field in fields(cls)]
        for name, value in options.items():
            if name not in names:
                import difflib  # here, because only a wrong call needs it

                near = _OTHER_NAMES.get(name)
                if near is None and name not in _WITHOUT_EQUAL:
                    near = next(iter(difflib.get_close_matches(name, [*names, *parameters], 1)), None)
                remedy = f"use {near}" if near else f"the options are {', '.join(names)}"
                raise ConfigError(f"{name}={value!r} is not an option of generation: {remedy}", field=name)
        return replace(config or cls(), **options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationConfig:
        """The settings in the `generation_config.json` of a model; `options` replace fields.

        They mean what they mean in transformers: if `do_sample` is true and no `top_k` is stated, it is 50. A GPT2Warning
        names settings without an equivalent here. The end tokens in the file belong to the model, which has read them.

        Raises ConfigError if there is no such file or a value is invalid, and ModelNotFoundError for an unknown name.
        """
        from gpt_config.locate import locate  # here, because generation itself needs no files

        folder = locate(
            name_or_folder,
            files=[(GENERATION_FILE,)],
            complete=lambda folder: (folder / GENERATION_FILE).is_file(),
            revision=revision,
        )
        path = folder / GENERATION_FILE
        if not path.is_file():
            raise ConfigError(f"{folder} has no {GENERATION_FILE}: use GenerationConfig(), this package's defaults")
        stated = generation_settings(folder)
        values: dict[str, Any] = {field: stated.pop(name) for name, field in _FIELDS.items() if name in stated}
        if values.get("do_sample") is True:
            values.setdefault("top_k", _TRANSFORMERS_TOP_K)
        if values.get("top_k") == 0:  # no limit
            values["top_k"] = None
        if isinstance(values.get("stop"), str):
            values["stop"] = (values["stop"],)
        if stated:
            listed = ", ".join(f"{name}={value!r}" for name, value in stated.items())
            warnings.warn(f"{path} has settings without an equivalent here, which are left out: {listed}", GPT2Warning, 2)
        try:
            return cls.of(None, {**values, **options})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}", field=error.field, other_fields=error.other_fields) from None

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
                raise ConfigError(f"stop={stop!r} must be a string of at least one character", field="stop")
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        if self.do_sample:
            raise ConfigError(
                f"num_beams={self.num_beams} (beam search) excludes do_sample (random sampling): choose one",
                field="num_beams",
                other_fields=("do_sample",),
            )
        if self.speculate:
            raise ConfigError(
                f"num_beams={self.num_beams} (beam search) excludes speculate (drafts of a single text): choose one",
                field="num_beams",
                other_fields=("speculate",),
            )
        if self.num_return_sequences > self.num_beams:
            raise ConfigError(
                f"num_return_sequences={self.num_return_sequences} is more than num_beams={self.num_beams}: "
                "beam search returns at most one text per beam",
                field="num_return_sequences",
                other_fields=("num_beams",),
            )

    @property
    def greedy(self) -> bool:
        """Whether each step takes the most probable token."""
        return not self.do_sample or self.temperature == 0
