"""GenerationConfig: how a prompt is continued. It knows nothing of the model, which checks the limits that depend on it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from gpt_config.errors import ConfigError, GPT2Warning, InputTypeError
from gpt_config.model_config import GENERATION_FILE, read_generation_file
from gpt_config.validation import check_bool, check_real, check_seed, check_whole, plain_number, plain_numbers

# How a search with beams ends: see `generation.beam_search`.
EarlyStopping = bool | Literal["never"]


class GenerationOptions(TypedDict, total=False):
    """The fields of GenerationConfig as keyword arguments: `def generate(..., **options: Unpack[GenerationOptions])`."""

    max_new_tokens: int
    min_new_tokens: int
    max_time: float | None
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    penalty_window: int | None
    no_repeat_ngram_size: int
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]]
    bad_words: Sequence[str | Sequence[int]]
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    speculate: bool
    num_return_sequences: int
    stop: Sequence[str]
    stop_at_eot: bool
    eos_token_id: int | Sequence[int] | None
    top_logprobs: int
    seed: int | None


# Other programs' names for these options.
_OTHER_NAMES = {
    **dict.fromkeys(("max_tokens", "max_length", "max_completion_tokens", "max_gen_toks", "length"), "max_new_tokens"),
    **dict.fromkeys(("num_samples", "num_sample", "nsamples", "n"), "num_return_sequences"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "until"), "stop"),
    **dict.fromkeys(("sample", "sampling"), "do_sample"),
    **dict.fromkeys(("beams", "beam_size", "beam_width"), "num_beams"),
    **dict.fromkeys(("random_seed", "generator"), "seed"),
    **dict.fromkeys(("min_tokens", "min_gen_toks"), "min_new_tokens"),
    **dict.fromkeys(("eos_token_ids", "stop_token_ids", "end_tokens"), "eos_token_id"),
    **dict.fromkeys(("ignore_eos", "ignore_eot"), "stop_at_eot"),
    **dict.fromkeys(("repeat_last_n", "repetition_window", "penalty_last_n"), "penalty_window"),
    **dict.fromkeys(("timeout", "max_seconds"), "max_time"),
    "bad_words_ids": "bad_words",
    "sequence_bias": "logit_bias",
    "typical": "typical_p",
    "repeat_penalty": "repetition_penalty",
}
# Options of other programs that have no equivalent here. No option is suggested for them, even if its name is similar.
_WITHOUT_EQUAL = {
    *("min_length", "best_of", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "epsilon_cutoff"),
    *("eta_cutoff", "num_beam_groups", "diversity_penalty", "penalty_alpha", "begin_suppress_tokens"),
}

# The settings of a generation_config.json that are fields here, by their names there.
_FIELDS = {
    **{
        name: name
        for name in (
            *("max_new_tokens", "min_new_tokens", "max_time", "do_sample", "temperature", "top_k", "top_p", "min_p"),
            *("typical_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty", "early_stopping"),
            "num_return_sequences",
        )
    },
    "stop_strings": "stop",
    "bad_words_ids": "bad_words",
}
# What transformers applies if `do_sample` is true and no `top_k` is stated.
_TRANSFORMERS_TOP_K = 50
# Values in a generation_config.json that change nothing. Keys with None say what is returned, or how it is computed.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("do_sample", "early_stopping", "renormalize_logits", "remove_invalid_values"), False),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "length_penalty"), 1.0),
    **dict.fromkeys(("encoder_repetition_penalty", "num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    "diversity_penalty": 0,
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

    `logit_bias` may be a mapping and `eos_token_id` one id; both are stored as tuples. `generation.processors` describes the
    controls from `repetition_penalty` to `bad_words`.

    >>> GenerationConfig(do_sample=True, temperature=0.7, top_k=40).greedy
    False
    """

    max_new_tokens: int = 100
    min_new_tokens: int = 0  # no end token before this many tokens
    max_time: float | None = None  # seconds after the start of a continuation, when it ends with the next token
    do_sample: bool = False  # False: always take the most probable token
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None  # sample from the k most probable tokens; 0 means None
    top_p: float | None = None  # ... from the fewest tokens whose probabilities sum to p or more (Holtzman et al. 2019)
    min_p: float | None = None  # ... from tokens at least min_p times as probable as the most probable one
    typical_p: float | None = (
        None  # ... from the tokens closest to the entropy, up to this probability (Meister et al. 2022)
    )
    repetition_penalty: float = 1.0  # above 1: tokens already in the text become less likely (Keskar et al. 2019)
    frequency_penalty: float = 0.0  # subtracted for each time that a token is in the new text (OpenAI's API)
    presence_penalty: float = 0.0  # subtracted once from each token of the new text (OpenAI's API)
    penalty_window: int | None = None  # the three penalties count the last tokens only, this many; None: all
    no_repeat_ngram_size: int = 0  # no sequence of this many tokens occurs twice; 0: any may
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id -> number added to its logit; -inf excludes it
    bad_words: tuple[str | tuple[int, ...], ...] = ()  # texts or sequences of ids that are not generated
    num_beams: int = 1  # above 1: beam search
    length_penalty: float = 1.0  # beams are ranked by log-probability / length ** length_penalty
    early_stopping: EarlyStopping = False  # True: end at num_beams finished beams; "never": when none can become better
    speculate: bool = False  # draft tokens and verify them together: the same text, faster if the text repeats itself
    num_return_sequences: int = 1  # continuations per prompt
    stop: tuple[str, ...] = ()  # strings that end a continuation; they are not part of it
    stop_at_eot: bool = True  # end at the end tokens; False: continue after them
    eos_token_id: tuple[int, ...] | None = None  # the end tokens; None: the model's own
    top_logprobs: int = 0  # how many of the most probable tokens of each step a Completion lists
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
        if isinstance(values.get("stop"), str):
            values["stop"] = (values["stop"],)
        if bias := _bias_of(stated):
            values["logit_bias"] = bias
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
        check_whole("top_logprobs", self.top_logprobs, 0)
        if self.top_k is not None:
            check_whole("top_k", self.top_k, 0, " (0 is no limit)")
            self._set("top_k", self.top_k or None)
        if self.seed is not None:
            check_seed(self.seed)
        check_real("temperature", self.temperature, lambda t: t >= 0, "0 (greedy) or a positive number")
        if self.top_p is not None:
            check_real("top_p", self.top_p, lambda p: 0 < p <= 1, "above 0 and at most 1 (1 is no limit)")
        if self.min_p is not None:
            check_real("min_p", self.min_p, lambda p: 0 <= p <= 1, "between 0 (no limit) and 1")
        if self.typical_p is not None:
            check_real("typical_p", self.typical_p, lambda p: 0 < p <= 1, "above 0 and at most 1 (1 is no limit)")
        if self.max_time is not None:
            check_real("max_time", self.max_time, lambda t: t > 0, "a positive number of seconds")
        check_bool("do_sample", self.do_sample)
        check_bool("speculate", self.speculate)
        check_bool("stop_at_eot", self.stop_at_eot)
        self._check_penalties()
        self._check_tokens()
        if not isinstance(self.stop, (tuple, list)):
            raise ConfigError(f"stop={self.stop!r} must be a tuple of strings, such as ('.', 'END')", field="stop")
        for stop in self.stop:
            if not isinstance(stop, str) or not stop:
                raise ConfigError(f"stop={stop!r} must be a string of at least one character", field="stop")
        self._set("stop", tuple(self.stop))
        check_real("length_penalty", self.length_penalty, lambda _: True, "a number (0 ranks by total log-probability)")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ConfigError(
                f"early_stopping={self.early_stopping!r} must be true, false or 'never'", field="early_stopping"
            )
        if self.num_beams > 1:
            self._check_beams()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_penalties(self) -> None:
        check_real("repetition_penalty", self.repetition_penalty, lambda r: r > 0, "positive (1 is no penalty)")
        for name in ("frequency_penalty", "presence_penalty"):
            check_real(name, getattr(self, name), lambda _: True, "a number (0 is no penalty)")
        if self.penalty_window is not None:
            check_whole("penalty_window", self.penalty_window, 1, " (leave it out to count all tokens)")
        check_whole("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, " (0 is no limit)")

    def _check_tokens(self) -> None:
        """Check the fields that name tokens, and store them as tuples."""
        self._set("logit_bias", _checked_bias(self.logit_bias))
        self._set("bad_words", _checked_bad_words(self.bad_words))
        if self.eos_token_id is not None:
            ends = (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id
            self._set("eos_token_id", _checked_ids("eos_token_id", ends, self.eos_token_id))
            if not self.stop_at_eot:
                raise ConfigError(
                    f"eos_token_id={self.eos_token_id!r} names tokens at which a text ends, and stop_at_eot=False ignores "
                    "them: choose one",
                    field="eos_token_id",
                    other_fields=("stop_at_eot",),
                )
        check_whole("min_new_tokens", self.min_new_tokens, 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}: lower one",
                field="min_new_tokens",
                other_fields=("max_new_tokens",),
            )

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

    @property
    def has_token_controls(self) -> bool:
        """Whether a control other than `min_new_tokens` may change the logits before temperature and truncation."""
        return bool(
            self.repetition_penalty != 1
            or self.frequency_penalty
            or self.presence_penalty
            or self.no_repeat_ngram_size
            or self.logit_bias
            or self.bad_words
        )

    @property
    def bad_word_ids(self) -> tuple[tuple[int, ...], ...]:
        """`bad_words`, if all are sequences of ids. Raises ConfigError if one is text, which needs a tokenizer."""
        for word in self.bad_words:
            if isinstance(word, str):
                raise ConfigError(
                    f"bad_words={word!r} needs a tokenizer: use gpt2.complete(), which has one, or give its ids",
                    field="bad_words",
                )
        return tuple(word for word in self.bad_words if not isinstance(word, str))


def _checked_ids(field: str, ids: object, value: object) -> tuple[int, ...]:
    found = tuple(map(plain_number, ids)) if isinstance(ids, Sequence) and not isinstance(ids, (str, bytes)) else ()
    if not found or not all(type(token) is int and token >= 0 for token in found):
        raise ConfigError(f"{field}={value!r} must be token ids: whole numbers of 0 or more", field=field)
    return found


def _checked_bias(bias: Any) -> tuple[tuple[int, float], ...]:
    """The pairs of a mapping or of a sequence of pairs, in the order of the ids. JSON's keys are strings."""
    example = "must map token ids to numbers, such as {50256: -5.0} (-inf excludes a token)"
    try:
        pairs = dict(bias)
    except (TypeError, ValueError):
        raise ConfigError(f"logit_bias={bias!r} {example}", field="logit_bias") from None
    checked = {}
    for token, number in pairs.items():
        token_id = int(token) if isinstance(token, str) and token.isdecimal() else plain_number(token)
        number = plain_number(number)
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if type(token_id) is not int or token_id < 0 or not is_number or not -float("inf") <= number < float("inf"):
            raise ConfigError(f"logit_bias={{{token!r}: {number!r}}} {example}", field="logit_bias")
        checked[token_id] = float(number)
    return tuple(sorted(checked.items()))


def _checked_bad_words(words: object) -> tuple[str | tuple[int, ...], ...]:
    if not isinstance(words, (tuple, list)):
        raise ConfigError(f"bad_words={words!r} must be a list of texts, or of lists of token ids", field="bad_words")
    for word in words:
        if word == "":
            raise ConfigError("bad_words='' must be a text of at least one character", field="bad_words")
    return tuple(word if isinstance(word, str) else _checked_ids("bad_words", word, word) for word in words)


def _bias_of(stated: dict[str, Any]) -> dict[int, float]:
    """Take `sequence_bias` of single tokens and `suppress_tokens` out of `stated`, as a bias for each id."""
    bias = {}
    sequences = stated.get("sequence_bias")
    if isinstance(sequences, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list) and list(map(type, pair[0])) == [int]
        for pair in sequences
    ):
        bias = {token: number for [token], number in stated.pop("sequence_bias")}
    suppressed = stated.get("suppress_tokens")
    if isinstance(suppressed, list) and set(map(type, suppressed)) == {int}:
        bias |= dict.fromkeys(stated.pop("suppress_tokens"), -float("inf"))
    return bias
