"""Speculative decoding: guesses of the next tokens, and how many of them are worth a try. The decode loop verifies them.

It knows nothing of how a token is chosen. The loop runs the model once on the last token and the drafts; then, place by
place, it chooses the token as it would without drafts, from logits that have only taken tokens before them, and by the
same random number. Where that is the draft, the next place's logits are those of the text and the loop goes on; where it
is not, the chosen token stands and the rest of the drafts is forgotten. So a draft is a guess of the draw and never part
of it: whatever is guessed, a seed gives the tokens that it gives without speculation, up to the rounding of a product
of several rows, which is also that of a batch (in 16 bits and in int8, where that would be coarse, each row has the bits of
a step of its own, on a CPU). Leviathan et al. 2023 ("Fast Inference from Transformers via
Speculative Decoding") accept a draft with a probability that keeps the distribution; to keep the draw itself is
stronger, and equal to theirs for drafts without a distribution. Prompt lookup is Saxena's (2023, "Prompt Lookup
Decoding").
"""

from __future__ import annotations

import copy
import itertools
import operator
import random
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gpt2.checkpoints.model_tokenizer import tokenizer_of
from gpt2.decode_graph import GraphedSteps
from gpt2.decoder import Decoder, Window
from gpt2.device import has_matrix_units
from gpt2.model import GPT2
from gpt2.quantization import is_int8
from gpt_config.errors import CheckpointError, InputError
from gpt_encoder.interface import Tokenizer

# (logits (B, V), the B texts, their generators) -> a token for each: the decode loop's own way to choose.
Choose = Callable[[Tensor, list[list[int]], list[random.Random]], list[int]]

_MATCHES = (4, 3, 2)  # tokens; a single one that came before says too little
_DRAFT_MODEL_EVIDENCE = 4  # until it has shown how good it is, as good as the longest match
_N_DRAFTS = (1, 2, 4, 8, 16)

# In units of a plain decode step: what may be paid on average for drafts that are not taken; how far a promising draft may
# overdraw the account; and how much of a gain is kept for later.
_SHARE_FOR_TRIALS = 0.01
_OVERDRAFT = 0.5
_MOST_CREDIT = 3.0


class Drafter(Protocol):
    """Whoever guesses."""

    def evidence(self, ids: list[int]) -> int:
        """What speaks for a guess of what follows `ids`: the larger the more, 0 where there is none to be made."""

    def cost(self, n_drafts: int) -> float:
        """What as many guesses now cost, in decode steps of the model that is to verify them."""

    def propose(self, ids: list[int], n_drafts: int, generator: random.Random) -> list[int]:
        """Up to `n_drafts` tokens that may follow `ids`. The generator is the row's own and stays as it is."""


class PromptLookup:
    """Guesses that what followed the last few tokens before will follow them again. The evidence is how many they are."""

    def __init__(self, n_positions: int) -> None:
        self._n_positions = n_positions
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind its latest occurrence
        self._n_indexed = 0

    def evidence(self, ids: list[int]) -> int:
        """The length of the longest n-gram that ends the text and stands before in it."""
        # Of a long prompt only what the model sees; then each token once.
        for end in range(max(self._n_indexed, len(ids) - self._n_positions), len(ids)):
            for n in _MATCHES:
                if n <= end:
                    self._behind[tuple(ids[end - n : end])] = end
        self._n_indexed = len(ids)
        return next((n for n in _MATCHES if tuple(ids[-n:]) in self._behind), 0)

    def cost(self, n_drafts: int) -> float:
        """Next to nothing."""
        return 0.0

    def propose(self, ids: list[int], n_drafts: int, generator: random.Random) -> list[int]:
        """What followed the longest match; where that reaches the end of the text, it goes on with the guess itself."""
        at = self._behind[tuple(ids[-self.evidence(ids) :])]
        period = ids[at : at + n_drafts]
        return (period * (n_drafts // len(period) + 1))[:n_drafts]


class DraftModel:
    """Guesses what a smaller model would write, chosen as the large one's tokens are and by the same random numbers."""

    def __init__(self, draft_model: GPT2, model: GPT2, choose: Choose) -> None:
        self._cost_of_step = _relative_cost(draft_model, model)
        self._model = draft_model
        self._choose = choose
        self._decoder: Decoder | None = None  # has read all of its window, which a decoder else has but for the last token
        self._offset = 0  # the place in the text where the window's list begins
        self._n_unread = 0
        self._n_known = 0  # tokens of the text when it was last read; what the window has behind them are drafts

    def evidence(self, ids: list[int]) -> int:
        """Always the same; it is also the time to see how much there is to read before the first guess."""
        self._n_unread = 0 if self._decoder is None else len(ids) - self._n_known - 1
        return _DRAFT_MODEL_EVIDENCE if self._model.config.n_positions > 1 else 0

    def cost(self, n_drafts: int) -> float:
        """A step a guess, and a tenth for each token that it has not read yet, but for the prompt."""
        return self._cost_of_step * (n_drafts + 0.1 * self._n_unread)

    def propose(self, ids: list[int], n_drafts: int, generator: random.Random) -> list[int]:
        """One forward pass of the draft model a guess; the first also reads what was written since the last call."""
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
        self._decoder = decoder = Decoder(self._model, [Window(text, limit)], limit)
        return decoder, decoder.next_logits()


class Speculation:
    """When to draft for one row, and how much: as many tokens as pay, by how often such drafts were taken so far.

    `credit` is an account in units of a plain decode step. Every step pays in a small share; a step with drafts pays for
    what it takes longer than a plain one and earns the tokens that were taken. Drafts that promise no gain are tried while
    there is credit, so a text that cannot be guessed is slower by about that share, and one that can is soon found out.
    Costs are figures, not measured times, so that one seed makes the same steps in every run. Greedy steps without drafts
    come several at a time, as many as the clock allows, so there the next look for drafts may be a few tokens later.
    """

    def __init__(self, drafter: Drafter, costs: tuple[float, float]) -> None:
        self._drafter = drafter
        self._costs = costs
        self._credit = 0.0
        self._evidence = 0
        # By evidence, drafts taken and refused; older ones count less. They begin with what ordinary texts showed.
        self._counts = {evidence: (2 + 0.8 * evidence, 6 - 0.8 * evidence) for evidence in range(1, 5)}

    def draft(self, ids: list[int], room: int, generator: random.Random) -> list[int]:
        """At most `room` guesses of what follows `ids`, often none."""
        self.stepped(1)
        self._evidence = self._drafter.evidence(ids)
        if not self._evidence or room < 1:
            return []
        # Only as many as would pay if all were taken.
        n_drafts = max((n for n in _N_DRAFTS if self._cost(n) < n <= room), key=self._gain, default=0)
        if not n_drafts or self._credit <= (-_OVERDRAFT if self._gain(n_drafts) > 0 else 0):
            return []
        return self._drafter.propose(ids, n_drafts, generator)

    def stepped(self, n_steps: int) -> None:
        """Let steps pay in, also those for which nobody asked for drafts."""
        self._credit = min(self._credit + n_steps * _SHARE_FOR_TRIALS, _MOST_CREDIT)

    def verified(self, n_drafts: int, n_taken: int) -> None:
        """Learn from a step with drafts: how many there were, and how many were the tokens."""
        self._credit += n_taken - self._cost(n_drafts)
        taken, refused = self._counts[self._evidence]
        self._counts[self._evidence] = 0.9 * taken + n_taken, 0.9 * refused + (n_taken < n_drafts)

    def _gain(self, n_drafts: int) -> float:
        """How many steps are saved on average, if each draft behind one that is taken is taken with the same probability."""
        taken, refused = self._counts[self._evidence]
        return sum((taken / (taken + refused)) ** n for n in range(1, n_drafts + 1)) - self._cost(n_drafts)

    def _cost(self, n_drafts: int) -> float:
        return self._costs[0] + self._costs[1] * n_drafts + self._drafter.cost(n_drafts)


def check_vocabularies(model: GPT2, draft_model: GPT2, tokenizer: Tokenizer | None = None) -> None:
    """InputError unless a token id means the same to both models; `tokenizer` is that of `model`, where there is one."""
    ours, theirs = model.config.vocab_size, draft_model.config.vocab_size
    name = f"the draft model {draft_model.pretrained_from or ''}".rstrip()
    if ours != theirs:
        raise InputError(
            f"{name} has a vocabulary of {theirs} tokens and the model one of {ours}: name a smaller model that shares it"
        )
    if tokenizer is None or draft_model.pretrained_from is None:
        return
    other = tokenizer_of(draft_model)
    if other is not None and (other.token_bytes, other.special_tokens) != (tokenizer.token_bytes, tokenizer.special_tokens):
        raise InputError(
            f"{name} has {theirs} tokens as the model has, but not the same ones: name a smaller model that shares them"
        )


def costs_of_verifying(model: GPT2, *, each_alone: bool) -> tuple[float, float]:
    """How much longer a step with drafts takes, in plain steps: with any, and for each of them.

    Measured with gpt2-tiny and 124M on a CPU, rounded up. It goes through Python, which several greedy steps in a row do
    not, and which takes as long as to read 4 MB. To call the operations of a block takes as long as to read 2 MB. With
    `each_alone`, as `DecodePlan` computes them in int8 and 16 bits, the former calls twice as many, and a fifth more for
    each draft; the latter, and bfloat16 without matrix units, half of them for each draft, and reads the weights again from
    the processor's cache. On a GPU it is supposed: kernels are launched one by one, and not replayed (`decode_graph`).
    """
    if GraphedSteps.fits(model):
        return 4.0, 0.1
    n_bytes = sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
    calls = 2e6 * model.config.n_layer
    python, share = 4e6 / (calls + n_bytes), calls / (calls + n_bytes)
    if each_alone and is_int8(model):
        return 2 * share + python, 0.11 + 0.21 * share
    if each_alone and not (model.dtype == torch.bfloat16 and has_matrix_units()):
        return 0.1 + python, 0.46 + 0.57 * share
    return 0.4 + python, 0.11


def _relative_cost(draft_model: GPT2, model: GPT2) -> float:
    """A decode step of one in units of the other's: to read the weights counts half, and to call the layers half."""
    n_bytes = [sum(weight.nbytes for weight in (*m.parameters(), *m.buffers())) for m in (draft_model, model)]
    return (n_bytes[0] / n_bytes[1] + draft_model.config.n_layer / model.config.n_layer) / 2
