"""Beam search for the most probable continuation. It depends on the decoder; it works on ids, not on text.

The algorithm is that of transformers' `generate` with default settings. The score of a continuation is the mean of its
log-probabilities. The search ends when `num_beams` beams have finished and the best running beam scores no higher than the
worst of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gpt2.fast.limits import FAST, FastLimits
from gpt2.generation import sampling
from gpt2.generation.decoder import Decoder
from gpt2.generation.window import Window
from gpt2.model import GPT2
from gpt_config.generation_config import GenerationConfig


@dataclass
class Beam:
    """A continuation with the model's log-probabilities. `total` is their sum after the repetition penalty."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    total: float = 0.0
    at_eot: bool = False

    @property
    def score(self) -> float:
        """The mean per token; the end-of-text token counts as one."""
        return self.total / max(1, len(self.ids))


def beam_search(
    model: GPT2,
    prompt_ids: list[int],
    config: GenerationConfig,
    *,
    vocab_size: int | None = None,
    use_cache: bool = True,
    fast: FastLimits = FAST,
) -> list[Beam]:
    """Search from `prompt_ids` with `config.num_beams` beams.

    Returns `config.num_return_sequences` beams, the best first; if fewer were found, the last one is repeated.
    """
    width = config.num_beams
    ends = model.config.eos_token_ids if config.stop_at_eot else ()
    running, finished = [Beam()], []
    windows = [Window(list(prompt_ids), model.config.n_positions)]
    decoder = Decoder(model, windows, config.max_new_tokens, use_cache=use_cache, fast=fast)
    for step in range(1, config.max_new_tokens + 1):
        candidates = _best_candidates(decoder, prompt_ids, running, config, vocab_size)
        is_last = step == config.max_new_tokens
        for beam, _ in candidates[:width]:
            beam.at_eot = beam.ids[-1] in ends
            if beam.at_eot or is_last:
                finished.append(beam)
        finished = sorted(finished, key=lambda beam: -beam.score)[:width]
        survivors = [(beam, parent) for beam, parent in candidates if beam.ids[-1] not in ends][:width]
        if is_last or not survivors:
            break
        running = [beam for beam, _ in survivors]
        if len(finished) == width and finished[-1].score >= running[0].score:
            break
        decoder.select([parent for _, parent in survivors])
        decoder.windows = [window.extended(beam.ids[-1]) for window, beam in zip(decoder.windows, running, strict=True)]
    best = finished or [Beam()]
    return [best[min(place, len(best) - 1)] for place in range(config.num_return_sequences)]


@torch.inference_mode()
def _best_candidates(
    decoder: Decoder, prompt_ids: list[int], running: list[Beam], config: GenerationConfig, vocab_size: int | None
) -> list[tuple[Beam, int]]:
    """Return the best one-token extensions of all running beams, each with the index of the beam that it extends."""
    logprobs = decoder.next_logits().float().log_softmax(-1)
    seen = [prompt_ids + beam.ids for beam in running]
    scores = sampling.apply_repetition_penalty(logprobs, seen, config.repetition_penalty)[:, :vocab_size]
    totals = scores + torch.tensor([beam.total for beam in running], device=scores.device)[:, None]
    # Twice the width, so that the search continues at full width even if every beam ends with its best candidate.
    best = totals.flatten().topk(min(2 * config.num_beams, totals.numel()))  # of (beams * V,)
    best_logprobs = logprobs[:, :vocab_size].flatten()[best.indices].tolist()
    candidates = []
    for total, place, logprob in zip(best.values.tolist(), best.indices.tolist(), best_logprobs, strict=True):
        parent, token = divmod(place, totals.shape[-1])
        beam = running[parent]
        candidates.append((Beam([*beam.ids, token], [*beam.logprobs, logprob], total), parent))
    return candidates
