"""Conversation: a text that a user and a model write in turn. It depends on the decode loop, not on terminals."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Unpack, cast

from gpt2.generation.batch import Batch
from gpt2.generation.chat_template import ChatTemplate
from gpt2.generation.draft_model import check_vocabularies
from gpt2.generation.loop import decode, start
from gpt2.generation.prefix_cache import PrefixCache
from gpt2.generation.prompts import encode_prompt, with_bad_word_ids
from gpt2.generation.row import Row
from gpt2.generation.text_stream import TextStream, stop_test
from gpt2.model import GPT2
from gpt2.weights.tokenizer import check_ids
from gpt_config.errors import GPT2Warning, InputTypeError
from gpt_config.generation_config import GenerationConfig, GenerationOptions
from gpt_encoder.interface import Tokenizer


class Template(Protocol):
    """The interface of `InstructionTemplate` that a conversation needs."""

    def prompt(self, instruction: str, *, input: str = "", system: str = "") -> str:
        """Return the text before the model's turn."""


@dataclass
class Turn:
    """What the user wrote and what the model answered. `ids` are the tokens of the answer, without the one that ended it."""

    text: str
    answer: str = ""
    ids: list[int] = field(default_factory=list)


class Conversation:
    """A conversation with a model. `turns` are those that it remembers; `prefix_cache` has their keys and values.

    - Without a `template`, user and model continue one text.
    - With an `InstructionTemplate`, each turn has the form of the training data, and ends with the end-of-text token.
    - With a `ChatTemplate`, the template of a model folder, the template decides.

    `system` precedes the first turn, for templates that have a place for it. When a prompt and the longest answer exceed the
    model's context, the oldest turns are dropped until the rest fills at most half of it, and a GPT2Warning says so: one
    large cut, because each cut requires computing the rest again. Otherwise only the new tokens of a turn are computed, in
    the dtypes in which `Decoder` uses a `PrefixCache`.

    >>> conversation = Conversation(model, tokenizer)  # doctest: +SKIP
    >>> for piece in conversation.answer("Once upon a time", do_sample=True):  # doctest: +SKIP
    ...     print(piece, end="", flush=True)
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer,
        template: Template | ChatTemplate | None = None,
        *,
        system: str = "",
        draft_model: GPT2 | None = None,
    ) -> None:
        if draft_model is not None:
            check_vocabularies(model, draft_model, tokenizer)
        self._model, self._tokenizer, self._draft_model = model, tokenizer, draft_model
        self.template, self.system = template, system
        self.turns: list[Turn] = []
        config = model.config
        bytes_per_token = 2 * config.n_layer * config.n_embd * model.wpe.weight.itemsize
        self.prefix_cache = PrefixCache(config.n_positions * bytes_per_token, keep_texts=True)

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()
        self.prefix_cache.clear()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as messages with a role (system, user or assistant) and a content."""
        return self._messages(self.turns)

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in turns:
            found.append({"role": "user", "content": turn.text})
            if turn.answer:
                found.append({"role": "assistant", "content": turn.answer})
        return found

    def answer(
        self, text: str, config: GenerationConfig | None = None, **options: Unpack[GenerationOptions]
    ) -> Generator[str]:
        """Add a turn, and yield the model's answer in pieces of whole characters.

        Close the iterator to stop the answer; what was generated stays in the conversation. A turn without a generated token
        is removed. `options` are fields of GenerationConfig and override `config`; there is one answer, whatever
        num_return_sequences. Wrong arguments raise in the call itself.
        """
        if not isinstance(text, str):
            raise InputTypeError(f"text must be a str, not {type(text).__name__}")
        config = with_bad_word_ids(GenerationConfig.of(config, options), self._tokenizer)
        config = replace(config, num_return_sequences=1)
        if self._draft_model is not None:
            config = replace(config, speculate=True)
        turn = Turn(text)
        n_dropped, ids = self._turns_that_fit(turn, config)
        check_ids(ids, self._tokenizer, self._model.config.vocab_size)
        [row] = start(self._model, [ids], config, ends_in_stop=stop_test(self._tokenizer, config.stop))
        if n_dropped:
            turns = "the oldest turn is" if n_dropped == 1 else f"the {n_dropped} oldest turns are"
            limit = self._model.config.n_positions
            warnings.warn(f"the conversation fills the model's {limit} positions: {turns} dropped", GPT2Warning, 2)
            del self.turns[:n_dropped]
        return self._answer(turn, row)

    def _answer(self, turn: Turn, row: Row) -> Generator[str]:
        self.turns.append(turn)
        stream = TextStream(self._tokenizer, row.config.stop)
        batch = Batch(
            self._model,
            vocab_size=self._tokenizer.vocab_size,
            draft_model=self._draft_model,
            prefix_cache=self.prefix_cache,
        )
        advances = cast("Generator[list[Row]]", decode(batch, [row]))
        try:
            for _ in advances:
                if piece := stream.read(row):
                    yield piece
        finally:
            advances.close()
            if row.finish_reason is None:
                row.finish_reason = "stop"
                stream.read(row)
            for _ in batch.step():  # the batch keeps what it has computed when it removes an ended row
                pass
            turn.answer, turn.ids = stream.text, row.ids
            if row.finish_reason == "eot":
                turn.ids = row.ids[:-1]
            elif stream.stopped:
                turn.ids = self._tokenizer.encode(stream.text, add_special_tokens=False)
            if not row.ids:
                self.turns.remove(turn)

    def _turns_that_fit(self, turn: Turn, config: GenerationConfig) -> tuple[int, list[int]]:
        """Return how many of the oldest turns to drop, so that there is room for an answer, and the ids of the prompt."""
        limit, turns = self._model.config.n_positions, [*self.turns, turn]
        ids = self._ids(turns)
        if len(ids) + min(config.max_new_tokens, limit // 2) <= limit:
            return 0, ids
        n_dropped = 0
        while n_dropped < len(self.turns) and len(ids) > limit // 2:
            n_dropped += 1
            ids = self._ids(turns[n_dropped:])
        return n_dropped, ids

    def _ids(self, turns: Sequence[Turn]) -> list[int]:
        """Return the ids of the prompt after which the model answers the last of `turns`."""
        template, eot = self.template, self._tokenizer.eot_token_id
        if isinstance(template, ChatTemplate):
            return template.ids(self._messages(turns), self._tokenizer)
        ids: list[int] = []
        for turn in turns:
            text = turn.text if template is None else template.prompt(turn.text, system=self.system)
            ids += encode_prompt(self._tokenizer, text, add_special_tokens=turn is turns[0])
            ids += turn.ids
            if template is not None and turn is not turns[-1] and eot is not None:
                ids.append(eot)
        return ids
