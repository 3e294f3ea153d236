"""Row: the complete state of one continuation. It depends on its config and window, not on a model or on other rows."""

from __future__ import annotations

import hashlib
import random
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor

from gpt2.generation.prefix_cache import Prefix
from gpt2.generation.processors import LogitsProcessor, Text
from gpt2.generation.speculation import Speculation
from gpt2.generation.window import Window
from gpt_config.generation_config import GenerationConfig
from gpt_config.model_config import GPT2Config

# "eot": end token; "stop": stop string; "length": max_new_tokens; "time": max_time
FinishReason = Literal["eot", "stop", "length", "time"]


@dataclass
class Row:
    """One continuation of one prompt. A `Batch` appends to `ids` and `logprobs`; the caller may set `finish_reason`.

    `logprobs` are natural logarithms of the model's probabilities before temperature, penalties and truncation. They are
    recorded if `wants_logprobs`. `top_logprobs` has the most probable ids of each step with the same logarithms, as many as
    the config's `top_logprobs`. If an end token ended the row, it is the last of `ids`.
    """

    prompt_ids: list[int]
    config: GenerationConfig
    n_positions: int  # of the model
    index: int = 0  # number of this continuation, from 0 to num_return_sequences - 1
    wants_logprobs: bool = False
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    speculation: Speculation | None = None  # statistics of the drafts for this row
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    processors: tuple[LogitsProcessor, ...] = ()
    ends_in_stop: Callable[[Sequence[int]], bool] | None = None  # for beams: whether new ids end with a stop string
    vectors: Mapping[int, Tensor] | None = None  # placeholder id in the prompt -> its embedding (C,)
    began: float | None = None  # seconds on the clock of the batch that admitted the row
    # Keys and values of the first tokens, which the caller has computed. A `SlotBatch` takes them; others compute all.
    beginning: Prefix | None = None

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
        config = self.config
        if not config.greedy or config.has_token_controls or self.processors or len(self.ids) < config.min_new_tokens:
            return False
        return not self.wants_logprobs and not config.top_logprobs

    @property
    def text(self) -> Text:
        """What the controls and sampling need. Embeddings of a prompt have no ids: the text then begins after them."""
        if self.vectors is None:
            return Text(self.window.ids, len(self.prompt_ids), self.generator)
        return Text(self.window.ids[len(self.prompt_ids) :], 0, self.generator)

    @property
    def n_tokens_left(self) -> int:
        """How many tokens the row may still get."""
        return self.config.max_new_tokens - len(self.ids)

    def append(self, token: int, logprob: float | None, ends: Collection[int]) -> None:
        """Append a token, and set `finish_reason` if it is the last one. `ends` are the tokens that end the row."""
        self.window.ids.append(token)
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in ends:
            self.finish_reason = "eot"
        elif len(self.ids) >= self.config.max_new_tokens:
            self.finish_reason = "length"


def end_ids(config: GenerationConfig, model_config: GPT2Config) -> tuple[int, ...]:
    """Return the tokens that end a text: those of `config`, or the model's own; none if they are ignored."""
    if not config.stop_at_eot:
        return ()
    return model_config.eos_token_ids if config.eos_token_id is None else config.eos_token_id
