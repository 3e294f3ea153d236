"""Sampling: small pure functions from logits to the next token of each row. They depend on torch and NumPy, not on models.

The `apply_` functions take logits (B, V) and return logits of the same shape, with -inf for excluded tokens. They can be
chained; `logits_to_probs` applies them in the order of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2.generation.processors import Controls, Text, process
from gpt_config.errors import CheckpointError
from gpt_config.generation_config import GenerationConfig


def is_finite(logits: Tensor) -> bool:
    """Return whether the largest of each row of logits (B, V) is finite. The others may be -inf."""
    # `math.isfinite` in Python, because each operation on tensors adds to the overhead of a step.
    return all(map(math.isfinite, logits.amax(-1).tolist()))


def check_finite(logits: Tensor) -> None:
    """Raise CheckpointError if logits (B, V) are not finite, as `is_finite` says."""
    if not is_finite(logits):
        raise CheckpointError(
            "the model computes NaN or infinite logits: its weights are damaged (use another copy of the files), or the "
            "range of its dtype is too small (use float32)"
        )


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide the logits by `temperature`: below 1 sharpens the distribution, above 1 flattens it.

    The largest logit of each row is subtracted first. This changes no probability, and the division cannot overflow to
    +infinity at any positive temperature.
    """
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def apply_top_k(logits: Tensor, top_k: int | None) -> Tensor:
    """Keep the `top_k` largest logits (Fan et al. 2018), and all that equal the smallest of these.

    None, and a number above the vocabulary, keep all.
    """
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(top_k).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def apply_top_p(logits: Tensor, top_p: float | None) -> Tensor:
    """Keep the fewest tokens whose probabilities add up to `top_p` or more (nucleus sampling, Holtzman et al. 2019).

    Among tokens with the smallest kept probability, those with the lowest ids are kept.
    """
    if top_p is None or top_p == 1:
        return logits
    probs = logits.double().softmax(-1)
    rows = probs.reshape(-1, probs.shape[-1]).numpy(force=True)  # (B, V)
    nuclei = np.array([_nucleus(row, float(top_p)) for row in rows]).reshape(*probs.shape[:-1], 2)  # (..., 2)
    least, n_kept = torch.from_numpy(nuclei).to(probs.device).split(1, -1)
    kept, equals = probs > least, probs == least
    n_equals = n_kept - kept.sum(-1, keepdim=True)
    if bool((equals.sum(-1, keepdim=True) > n_equals).any()):
        equals &= equals.cumsum(-1) <= n_equals
    return logits.masked_fill(~(kept | equals), -torch.inf)


def _nucleus(probs: NDArray[np.float64], top_p: float) -> tuple[float, int]:
    """Return the smallest kept probability of a row (V,), and the number of kept tokens.

    It uses NumPy, which sorts in a tenth of torch's time.
    """
    falling = np.sort(probs[probs > 0])[::-1]
    before = falling.cumsum() - falling  # the total probability of the tokens sorted before
    n_kept = int((before < top_p).sum())
    return float(falling[n_kept - 1]) if n_kept else np.inf, n_kept


def apply_min_p(logits: Tensor, min_p: float | None) -> Tensor:
    """Keep tokens that are at least `min_p` times as probable as the most probable one (Nguyen et al. 2024)."""
    if not min_p:
        return logits
    probs = logits.double().softmax(-1)
    return logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)


def apply_typical_p(logits: Tensor, typical_p: float | None) -> Tensor:
    """Keep the tokens whose log-probability is closest to the distribution's entropy (Meister et al. 2022, equation 7).

    They are the fewest whose probabilities add up to `typical_p` or more, and all that are as close as the last of them.
    """
    if typical_p is None or typical_p == 1:
        return logits
    logprobs = logits.double().log_softmax(-1)
    probs = logprobs.exp()
    entropy = torch.special.entr(probs).sum(-1, keepdim=True)
    distances, order = (-logprobs - entropy).abs().sort(-1)  # an excluded token has an infinite distance
    n_before = (probs.gather(-1, order).cumsum(-1) < typical_p).sum(-1, keepdim=True)
    farthest = distances.gather(-1, n_before.clamp(max=logits.shape[-1] - 1))
    return logits.masked_fill((-logprobs - entropy).abs() > farthest, -torch.inf)


def logits_to_probs(logits: Tensor, config: GenerationConfig) -> Tensor:
    """Return the distribution to sample from, float64 (B, V).

    The controls of `processors` are not included, because they need the text: apply them before.
    """
    logits = apply_temperature(logits.double(), config.temperature)
    logits = apply_top_k(logits, config.top_k)
    logits = apply_top_p(logits, config.top_p)
    logits = apply_min_p(logits, config.min_p)
    logits = apply_typical_p(logits, config.typical_p)
    return logits.softmax(-1)


def sample(probs: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Return one token for each row of `probs` (B, V), int64 (B,).

    It is the first token whose cumulative probability exceeds the row's number in [0, 1) from `uniforms`. A row's token
    therefore depends only on its own probabilities and number. In float64, differences in rounding between batches are very
    unlikely to change a token.
    """
    cumulative = probs.cumsum(-1)
    total = cumulative[..., -1]
    # Keep the thresholds below the total: at the total, the search would return V, or a last token of probability 0.
    thresholds = torch.tensor(uniforms, dtype=probs.dtype, device=probs.device) * total
    thresholds = thresholds.minimum(torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, thresholds[:, None], right=True)[:, 0]


def greedy(logits: Tensor) -> Tensor:
    """Return the most probable token of each row, int64 (B,); among equal logits, the lowest id."""
    if logits.device.type == "cpu":  # NumPy's argmax takes a twentieth of torch's time on the CPU
        return torch.from_numpy(logits.to(torch.promote_types(logits.dtype, torch.float32)).numpy().argmax(-1))
    return logits.argmax(-1)


@torch.inference_mode()
def choose(logits: Tensor, texts: Sequence[Text], controls: Controls, vocab_size: int | None) -> list[int]:
    """Return the next token of each of B texts, from logits (B, V).

    All texts have the same `controls`. Only ids below `vocab_size` are chosen; None allows all.
    """
    config, logits = controls.config, logits[:, :vocab_size]
    if config.greedy and all(controls.are_off(len(text.ids) - text.n_prompt) for text in texts):
        return tokens_of(greedy(logits))
    # In float64, so that the tokens are the same on every device; on the CPU, because not every device has float64.
    logits = process(logits.cpu().double(), texts, controls)
    if config.greedy:
        return tokens_of(greedy(logits))
    probs = logits_to_probs(logits, config)
    return tokens_of(sample(probs, [text.generator.random() for text in texts]))


def tokens_of(ids: Tensor) -> list[int]:
    """Return ids (B,) int64 as a list."""
    tokens: list[int] = ids.tolist()
    return tokens


@torch.inference_mode()
def logprobs_of(logits: Tensor, tokens: list[int]) -> list[float]:
    """Return the natural logarithm of each token's probability in its row of `logits` (B, V), computed in float64."""
    chosen = torch.tensor(tokens)[:, None]  # (B, 1)
    found: list[float] = logits.cpu().double().log_softmax(-1).gather(-1, chosen)[:, 0].tolist()
    return found


@torch.inference_mode()
def top_logprobs_of(logits: Tensor, n: int, vocab_size: int | None) -> list[list[tuple[int, float]]]:
    """Return the `n` most probable ids below `vocab_size` of each row of `logits` (B, V), with their logarithms.

    These are natural logarithms of probabilities among all V tokens, as in `logprobs_of`; the largest comes first.
    """
    logprobs = logits.cpu().double().log_softmax(-1)[:, :vocab_size]
    best = logprobs.topk(min(n, logprobs.shape[-1]))
    return [list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
