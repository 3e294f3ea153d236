"""The models that a server offers: each is loaded when it is first used. How one is loaded, the caller says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from gpt2.fast.plan import cache_dtype
from gpt2.generation.chat_template import ChatTemplate
from gpt2.generation.draft_model import check_vocabularies
from gpt2.model import GPT2
from gpt2.serving.fields import ApiError, shown
from gpt2.serving.own_thread import in_own_thread
from gpt_config.errors import GPT2Error
from gpt_encoder.interface import Tokenizer


@dataclass(eq=False)
class Served:
    """A model with its tokenizer, its name in the API, and its chat template, if it has one."""

    name: str
    model: GPT2
    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    speculate: bool = False  # draft tokens while it has a single row
    draft_model: GPT2 | None = None  # drafts them in place of the text itself; InputError if its vocabulary is another one
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        if self.draft_model is not None:
            check_vocabularies(self.model, self.draft_model, self.tokenizer)

    @property
    def n_positions(self) -> int:
        """The most tokens of a prompt; one more can be generated, which the model need not read."""
        return self.model.config.n_positions

    @cached_property
    def longest_token(self) -> int:
        """The bytes of the longest token. A text with more per position has too many tokens."""
        return max(map(len, self.tokenizer.token_bytes.values()), default=1)

    @property
    def bytes_per_slot(self) -> int:
        """The memory of the keys and values of a row that fills all positions."""
        config = self.model.config
        return 2 * config.n_layer * config.n_embd * config.n_positions * cache_dtype(self.model).itemsize


class Models:
    """The models by name. The first name is used by requests that name none."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Served]) -> None:
        self.names = list(dict.fromkeys(names))
        self._load = load
        self._loaded: dict[str, Served] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self.created = int(time.time())

    def check(self, name: str | None) -> str:
        """Return the name; ApiError 404 if there is no such model."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                f"there is no model {shown(name)} here: use {known}", status=404, code="model_not_found", param="model"
            )
        return name

    async def get(self, name: str | None) -> Served:
        """Return the model, which is loaded in a thread if it was not used before."""
        name = self.check(name)
        async with self._locks.setdefault(name, asyncio.Lock()):
            if name not in self._loaded:
                try:
                    self._loaded[name] = await in_own_thread(self._load, name)
                except GPT2Error as error:
                    raise ApiError(f"{name} cannot be loaded: {error}", status=500, code="model_not_loaded") from error
            return self._loaded[name]
