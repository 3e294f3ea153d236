"""GenerationConfig: how to continue a prompt. It knows nothing of the model; limits that depend on one are checked there."""

from __future__ import annotations

from dataclasses import dataclass

from gpt_config.errors import ConfigError
from gpt_config.validation import check_bool, check_real, check_seed, check_whole


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

    def __post_init__(self) -> None:
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
            raise ConfigError(f"stop={self.stop!r} must be a tuple of strings, such as ('.', 'END')")
        for stop in self.stop:
            if not isinstance(stop, str) or not stop:
                raise ConfigError(f"stop={stop!r} must be a text of at least one character")
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        if self.do_sample:
            raise ConfigError(
                f"num_beams={self.num_beams} searches for the most probable text and do_sample draws at random: choose one"
            )
        if self.speculate:
            raise ConfigError(
                f"num_beams={self.num_beams} follows several texts and speculation guesses how one goes on: choose one"
            )
        if self.num_return_sequences > self.num_beams:
            raise ConfigError(
                f"num_return_sequences={self.num_return_sequences} is more than num_beams={self.num_beams}: "
                "a search returns at most one text a beam"
            )

    @property
    def greedy(self) -> bool:
        """True when each step takes the most probable token."""
        return not self.do_sample or self.temperature == 0
