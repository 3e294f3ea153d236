"""Beam search for the most probable continuation. It depends on the decoder; it works on ids, not on text.

The algorithm is that of transformers' `generate`. A beam is finished at an end token, at a stop string or at the longest
length. Its score is the sum of its log-probabilities, after the controls of `processors`, divided by its length to the power
of `length_penalty`. The search ends when `num_beams` beams have finished and, by `early_stopping`:

- True: at once.
- False: the best running beam would score no higher than the worst finished one if it ended now.
- "never": nor would it with the most favourable length that it may still reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from gpt2.fast.limits import FAST, FastLimits
from gpt2.generation import sampling
from gpt2.generation.decoder import Decoder
from gpt2.generation.processors import Controls, LogitsProcessor, Text, process
from gpt2.generation.row import FinishReason, end_ids
from gpt2.generation.window import Window
from gpt2.model import GPT2
from gpt_config.generation_config import GenerationConfig

_NO_RANDOMNESS = Random(0)  # beams draw nothing


@dataclass
class Beam:
    """A continuation with the model's log-probabilities. `total` is their sum after the controls."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    total: float = 0.0
    finish_reason: FinishReason | None = None

    def score(self, length_penalty: float, length: int | None = None) -> float:
        """The total by the length, which is the number of ids unless it is given; an end token counts as one."""
        try:
            return self.total / math.pow(length or max(1, len(self.ids)), length_penalty)
        except OverflowError:  # the power is above the largest float
            return 0.0
        except ZeroDivisionError:  # ... or below the smallest one
            return math.copysign(math.inf, self.total)


def beam_search(
    model: GPT2,
    prompt_ids: list[int],
    config: GenerationConfig,
    *,
    vocab_size: int | None = None,
    use_cache: bool = True,
    fast: FastLimits = FAST,
    processors: tuple[LogitsProcessor, ...] = (),
    ends_in_stop: Callable[[Sequence[int]], bool] | None = None,
    is_late: Callable[[], bool] = lambda: False,
    vectors: Mapping[int, Tensor] | None = None,
) -> list[Beam]:
    """Search from `prompt_ids` with `config.num_beams` beams.

    Returns `config.num_return_sequences` beams, the best first; if fewer were found, the last one is repeated.
    `ends_in_stop` says of new ids whether they end with a stop string. If `is_late` after a step, the search ends there.
    `vectors` are those of a `Decoder`: the controls then see the new ids only.
    """
    width, ends = config.num_beams, end_ids(config, model.config)
    controls = Controls(config, ends, processors)
    text_before = [] if vectors else prompt_ids
    running, finished = [Beam()], []
    windows = [Window(list(prompt_ids), model.config.n_positions)]
    decoder = Decoder(model, windows, config.max_new_tokens, use_cache=use_cache, fast=fast, vectors=vectors)
    for step in range(1, config.max_new_tokens + 1):
        candidates = _best_candidates(decoder, text_before, running, controls, vocab_size)
        reason: FinishReason | None = "length" if step == config.max_new_tokens else "time" if is_late() else None
        for beam, _ in candidates:
            beam.finish_reason = "eot" if beam.ids[-1] in ends else reason
            if beam.finish_reason != "eot" and ends_in_stop and ends_in_stop(beam.ids):
                beam.finish_reason = "stop"
        finished += [beam for beam, _ in candidates[:width] if beam.finish_reason]
        finished = sorted(finished, key=lambda beam: -beam.score(config.length_penalty))[:width]
        survivors = [(beam, parent) for beam, parent in candidates if not beam.finish_reason][:width]
        if not survivors:
            break
        running = [beam for beam, _ in survivors]
        if len(finished) == width and not _may_improve(running[0], finished[-1], config):
            break
        decoder.select([parent for _, parent in survivors])
        decoder.windows = [window.extended(beam.ids[-1]) for window, beam in zip(decoder.windows, running, strict=True)]
    best = finished or [Beam()]
    return [best[min(place, len(best) - 1)] for place in range(config.num_return_sequences)]


def _may_improve(running: Beam, worst: Beam, config: GenerationConfig) -> bool:
    """Whether the best running beam may still replace the worst of `num_beams` finished ones."""
    if config.early_stopping is True:
        return False
    longest = config.early_stopping == "never" and config.length_penalty > 0
    best_score = running.score(config.length_penalty, config.max_new_tokens if longest else None)
    return best_score > worst.score(config.length_penalty)


@torch.inference_mode()
def _best_candidates(
    decoder: Decoder, text_before: list[int], running: list[Beam], controls: Controls, vocab_size: int | None
) -> list[tuple[Beam, int]]:
    """Return the best one-token extensions of all running beams, each with the index of the beam that it extends."""
    config, n_top = controls.config, controls.config.top_logprobs
    logits = decoder.next_logits()
    logprobs = logits.float().log_softmax(-1)[:, :vocab_size]
    texts = [Text(text_before + beam.ids, len(text_before), _NO_RANDOMNESS) for beam in running]
    scores = process(logprobs, texts, controls)
    totals = scores + torch.tensor([beam.total for beam in running], device=scores.device)[:, None]
    # More than the width, so that the search continues at full width even if each beam's best candidates are end tokens.
    n_candidates = max(2, 1 + len(controls.ends)) * config.num_beams
    best = totals.flatten().topk(min(n_candidates, totals.numel()))  # of (beams * V,)
    best_logprobs = logprobs.flatten()[best.indices].tolist()
    top = sampling.top_logprobs_of(logits, n_top, vocab_size) if n_top else []
    candidates = []
    for total, place, logprob in zip(best.values.tolist(), best.indices.tolist(), best_logprobs, strict=True):
        if total == -torch.inf:  # excluded by the controls
            break
        parent, token = divmod(place, totals.shape[-1])
        beam = running[parent]
        lists = [*beam.top_logprobs, top[parent]] if n_top else []
        candidates.append((Beam([*beam.ids, token], [*beam.logprobs, logprob], lists, total), parent))
    return candidates
