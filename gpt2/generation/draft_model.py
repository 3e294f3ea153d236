"""DraftModel: drafts by a smaller model of the same vocabulary. It knows two models; `Batch` verifies."""

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

# (logits (B, V), the B texts, their generators) -> a token for each: the way in which the row's own tokens are chosen.
Choose = Callable[[Tensor, list[list[int]], list[random.Random]], list[int]]


class DraftModel:
    """Drafts what a smaller model would write, chosen as the large one's tokens are, by the same random numbers."""

    def __init__(self, draft_model: GPT2, model: GPT2, choose: Choose, fast: FastLimits = FAST) -> None:
        self._cost_of_step = relative_cost(draft_model, model)
        self._model = draft_model
        self._choose, self._fast = choose, fast
        self._decoder: Decoder | None = None  # it has read its whole window, the last token too
        self._offset = 0  # the place in the text where the window's list begins
        self._n_unread = 0
        self._n_known = 0  # tokens of the text when it was last read; the window has drafts after them

    def evidence(self, ids: list[int]) -> int:
        """Always the most. Also notes how many tokens the draft model has to read before its first draft."""
        self._n_unread = 0 if self._decoder is None else len(ids) - self._n_known - 1
        return MAX_EVIDENCE if self._model.config.n_positions > 1 else 0

    def cost(self, n_drafts: int) -> float:
        """One step per draft, and a tenth for each token that it has not read yet, the prompt excepted."""
        return self._cost_of_step * (n_drafts + 0.1 * self._n_unread)

    def propose(self, ids: list[int], n_drafts: int, generator: random.Random) -> list[int]:
        """One forward pass of the draft model per draft; the first also reads what was written since the last call."""
        n_drafts = min(n_drafts, self._model.config.n_positions // 2)
        generator = copy.copy(generator)  # the numbers that the model's own tokens will be drawn by
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
        """Bring the decoder to the end of `ids`, from its last drafts if it can; its logits (1, V) there."""
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
    """InputError unless a token id means the same to both models; `tokenizer` is that of `model`, where there is one."""
    ours, theirs = model.config.vocab_size, draft_model.config.vocab_size
    name = f"the draft model {folder_of(draft_model) or ''}".rstrip()
    if ours != theirs:
        raise InputError(
            f"{name} has a vocabulary of {theirs} tokens and the model one of {ours}: name a smaller model that shares it"
        )
    if tokenizer is None or folder_of(draft_model) is None:
        return
    other = tokenizer_of(draft_model)
    if other is not None and (other.token_bytes, other.special_tokens) != (tokenizer.token_bytes, tokenizer.special_tokens):
        raise InputError(
            f"{name} has {theirs} tokens as the model has, but not the same ones: name a smaller model that shares them"
        )
