"""Row: the complete state of one continuation. It depends on its config and window, not on a model or on other rows."""

from __future__ import annotations

import hashlib
import random
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from gpt2.generation.speculation import Speculation
from gpt2.generation.window import Window
from gpt_config.generation_config import GenerationConfig

FinishReason = Literal["eot", "stop", "length"]


@dataclass
class Row:
    """One continuation of one prompt. A `Batch` appends to `ids` and `logprobs`; the caller may set `finish_reason`.

    `logprobs` are natural logarithms of the model's probabilities before temperature, penalties and truncation. They are
    recorded if `wants_logprobs`. If an end-of-text token ended the row, it is the last of `ids`.
    """

    prompt_ids: list[int]
    config: GenerationConfig
    n_positions: int  # of the model
    index: int = 0  # number of this continuation, from 0 to num_return_sequences - 1
    wants_logprobs: bool = False
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # "eot": end-of-text token; "stop": stop string; "length": max_new_tokens
    speculation: Speculation | None = None  # statistics of the drafts for this row

    @cached_property
    def window(self) -> Window:
        """The ids of the prompt and the continuation, and which of them the model sees."""
        return Window(self.prompt_ids + self.ids, self.n_positions)

    @cached_property
    def generator(self) -> random.Random:
        """A random generator that depends only on the seed, the prompt and the index, not on the batch or on earlier rows.

        Without a seed in the config, one is drawn. Python's generator gives the same numbers on every platform and device.
        The prompt is part of the key, so that different prompts draw different numbers with the same seed.
        """
        seed = secrets.randbits(63) if self.config.seed is None else self.config.seed
        key = f"{seed},{self.index},{self.prompt_ids}".encode()
        return random.Random(hashlib.blake2b(key, digest_size=16).digest())

    @property
    def takes_only_the_largest(self) -> bool:
        """Whether decoding needs only the index of the largest logit."""
        return self.config.greedy and self.config.repetition_penalty == 1 and not self.wants_logprobs

    @property
    def n_tokens_left(self) -> int:
        """How many tokens the row may still get."""
        return self.config.max_new_tokens - len(self.ids)

    def append(self, token: int, logprob: float | None, eot_tokens: Collection[int]) -> None:
        """Append a token, and set `finish_reason` if it is the last one. `eot_tokens` are those that end a text."""
        self.window.ids.append(token)
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self.config.stop_at_eot and token in eot_tokens:
            self.finish_reason = "eot"
        elif len(self.ids) >= self.config.max_new_tokens:
            self.finish_reason = "length"
