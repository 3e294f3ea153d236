"""DraftModel: drafts from a smaller model with the same vocabulary. It depends on the decoder; `Batch` verifies drafts."""

from __future__ import annotations

import copy
import itertools
import operator
import random
from collections.abc import Callable

from torch import Tensor

from gpt2.fast.costs import relative_cost
from gpt2.fast.limits import FAST, FastLimits
from gpt2.generation.decoder import Decoder
from gpt2.generation.speculation import MAX_EVIDENCE
from gpt2.generation.window import Window
from gpt2.model import GPT2
from gpt2.weights.tokenizer import folder_of, tokenizer_of
from gpt_config.errors import CheckpointError, InputError
from gpt_encoder.interface import Tokenizer

# (logits (B, V), the ids of the B texts, their random generators) -> B tokens. It is the function that chooses the tokens of
# the large model too.
Choose = Callable[[Tensor, list[list[int]], list[random.Random]], list[int]]


class DraftModel:
    """A `Drafter` (see `speculation`) that drafts the tokens of a smaller model.

    `choose` chooses them from logits in the way, and by the random numbers, of the large model's tokens.
    """

    def __init__(self, draft_model: GPT2, model: GPT2, choose: Choose, fast: FastLimits = FAST) -> None:
        self._cost_of_step = relative_cost(draft_model, model)
        self._model = draft_model
        self._choose, self._fast = choose, fast
        self._decoder: Decoder | None = None  # its cache includes the last token of its window
        self._offset = 0  # tokens of the text before the first token of the window's list
        self._n_unread = 0  # tokens that the draft model must read before its first draft
        self._n_known = 0  # tokens of the text at the last call; drafts follow them in the window

    def evidence(self, ids: list[int]) -> int:
        """Return MAX_EVIDENCE, or 0 if the context is 1 token. It also stores the number of unread tokens for `cost`."""
        self._n_unread = 0 if self._decoder is None else len(ids) - self._n_known - 1
        return MAX_EVIDENCE if self._model.config.n_positions > 1 else 0

    def cost(self, n_drafts: int) -> float:
        """One step of the draft model per draft, and a tenth of one per unread token; the prompt is not counted."""
        return self._cost_of_step * (n_drafts + 0.1 * self._n_unread)

    def propose(self, ids: list[int], n_drafts: int, generator: random.Random) -> list[int]:
        """Run the draft model once per draft; the first run also reads the tokens since the last call."""
        n_drafts = min(n_drafts, self._model.config.n_positions // 2)
        generator = copy.copy(generator)  # gives the same numbers that will choose the row's own tokens
        try:
            decoder, logits = self._read(ids, n_drafts)
            text, drafts = decoder.windows[0].ids, self._choose(logits, [ids], [generator])
            while len(drafts) < n_drafts:
                text.append(drafts[-1])
                drafts += self._choose(decoder.next_logits(), [[*ids, *drafts]], [generator])
        except CheckpointError as error:
            raise CheckpointError(f"the draft model: {error}") from None
        return drafts

    def _read(self, ids: list[int], n_drafts: int) -> tuple[Decoder, Tensor]:
        """Return a decoder that has read `ids`, and its logits (1, V) there.

        It continues from the accepted drafts if the cache has room, and otherwise starts with a new window.
        """
        decoder, first_unknown, self._n_known = self._decoder, self._n_known, len(ids)
        if decoder is not None:
            text = decoder.windows[0].ids
            drafts = text[first_unknown - self._offset :]
            n_taken = sum(1 for _ in itertools.takewhile(bool, map(operator.eq, drafts, ids[first_unknown:-1])))
            decoder.reject(len(drafts) - n_taken)
            token, *rest = ids[first_unknown + n_taken :]
            if len(rest) + n_drafts <= decoder.room:
                text[len(text) - len(drafts) + n_taken :] = [token]
                logits = decoder.next_logits(rest)[-1:]
                text += rest
                return decoder, logits
        limit = self._model.config.n_positions
        text = ids.copy() if len(ids) + n_drafts <= limit else ids[-(limit // 2) :]
        self._offset = len(ids) - len(text)
        self._decoder = decoder = Decoder(self._model, [Window(text, limit)], limit, fast=self._fast)
        return decoder, decoder.next_logits()


def check_vocabularies(model: GPT2, draft_model: GPT2, tokenizer: Tokenizer | None = None) -> None:
    """Raise InputError unless both models have the same vocabulary.

    The tokens themselves are compared if `tokenizer`, the one of `model`, and the one of `draft_model` are known.
    """
    ours, theirs = model.config.vocab_size, draft_model.config.vocab_size
    name = f"the draft model {folder_of(draft_model) or ''}".rstrip()
    if ours != theirs:
        raise InputError(
            f"{name} has a vocabulary of {theirs} tokens and the model has {ours}: use a draft model of the same vocabulary"
        )
    if tokenizer is None or folder_of(draft_model) is None:
        return
    other = tokenizer_of(draft_model)
    if other is not None and (other.token_bytes, other.special_tokens) != (tokenizer.token_bytes, tokenizer.special_tokens):
        raise InputError(
            f"{name} has {theirs} tokens like the model, but not the same tokens: use a draft model of the same vocabulary"
        )
