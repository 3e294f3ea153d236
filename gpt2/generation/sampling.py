"""From logits to the next token: small pure functions, each on a batch. They know nothing of models or text.

Every function takes logits (B, V) and returns logits of the same shape in which -inf marks what is excluded, so they can be
chained in the order of `logits_to_probs`, which is that of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt_config.errors import InputError
from gpt_config.generation_config import GenerationConfig


def apply_repetition_penalty(logits: Tensor, seen_ids: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Divide positive logits of the tokens in each row of `seen_ids` by `penalty`, multiply negative ones by it.

    Keskar et al. 2019, section 4.1, with the sign as transformers handles it. `penalty` 1 changes nothing.
    """
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, seen_ids, strict=True):
        seen = torch.tensor(sorted(set(ids)), dtype=torch.int64, device=row.device)
        scores = row[seen]
        largest = torch.finfo(row.dtype).max  # a tiny penalty must not make infinity, which has no softmax
        row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty).clamp(-largest, largest)
    return logits


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by `temperature`: below 1 sharpens the distribution, above 1 flattens it.

    The largest logit of a row becomes 0, which changes no probability and lets any positive temperature be divided by.
    """
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def check_top_k(top_k: int | None, vocab_size: int) -> None:
    """InputError if there are not as many tokens."""
    if top_k is not None and top_k > vocab_size:
        raise InputError(
            f"top_k={top_k} is more than the {vocab_size} tokens of this vocabulary: choose fewer, or leave it out"
        )


def apply_top_k(logits: Tensor, top_k: int | None) -> Tensor:
    """Keep the `top_k` largest logits (Fan et al. 2018), and any that equal the last of them."""
    if top_k is None:
        return logits
    check_top_k(top_k, logits.shape[-1])
    smallest_kept = logits.topk(top_k).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def apply_top_p(logits: Tensor, top_p: float | None) -> Tensor:
    """Keep the fewest tokens whose probabilities reach `top_p` (nucleus sampling, Holtzman et al. 2019).

    Of tokens as probable as the last of them, the first are kept.
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
    """The least probability that is kept of a row (V,), and how many are. NumPy sorts in a tenth of torch's time."""
    falling = np.sort(probs[probs > 0])[::-1]
    before = falling.cumsum() - falling  # the probability of all that is more probable
    n_kept = int((before < top_p).sum())
    return float(falling[n_kept - 1]) if n_kept else np.inf, n_kept


def apply_min_p(logits: Tensor, min_p: float | None) -> Tensor:
    """Keep tokens at least `min_p` times as probable as the most probable one (Nguyen et al. 2024)."""
    if not min_p:
        return logits
    probs = logits.double().softmax(-1)
    return logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)


def logits_to_probs(logits: Tensor, config: GenerationConfig) -> Tensor:
    """The distribution to draw from: float64 (B, V). A repetition penalty is applied before, since it needs the text."""
    logits = apply_temperature(logits.double(), config.temperature)
    logits = apply_top_k(logits, config.top_k)
    logits = apply_top_p(logits, config.top_p)
    logits = apply_min_p(logits, config.min_p)
    return logits.softmax(-1)


def sample(probs: Tensor, uniforms: Sequence[float]) -> Tensor:
    """One token a row, int64 (B,): the first whose cumulative probability exceeds the row's number from [0, 1).

    The number comes from outside, so a row's token depends on its own probabilities and its own number alone. In float64
    the batch's rounding of the logits has next to no chance to change a token.
    """
    cumulative = probs.cumsum(-1)
    total = cumulative[..., -1]
    # Always less than the total: no token comes after it, and the last one may have probability 0.
    thresholds = torch.tensor(uniforms, dtype=probs.dtype, device=probs.device) * total
    thresholds = thresholds.minimum(torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, thresholds[:, None], right=True)[:, 0]


def greedy(logits: Tensor) -> Tensor:
    """The most probable token of each row, int64 (B,); the first of equals."""
    if logits.device.type == "cpu":  # NumPy's takes a twentieth of the time there
        return torch.from_numpy(logits.to(torch.promote_types(logits.dtype, torch.float32)).numpy().argmax(-1))
    return logits.argmax(-1)


@torch.inference_mode()
def choose(
    logits: Tensor,
    texts: list[list[int]],
    generators: list[Random],
    config: GenerationConfig,
    vocab_size: int | None,
) -> list[int]:
    """The next token of each text (B), by one config, from logits (B, V) and each text's own random generator."""
    if config.greedy and config.repetition_penalty == 1:
        return tokens_of(greedy(logits[:, :vocab_size]))
    # In float64 and on the CPU, because not every device has it: the same tokens wherever the model runs.
    logits = logits.cpu().double()
    logits = apply_repetition_penalty(logits, texts, config.repetition_penalty)[:, :vocab_size]
    if config.greedy:
        return tokens_of(greedy(logits))
    probs = logits_to_probs(logits, config)
    return tokens_of(sample(probs, [generator.random() for generator in generators]))


def tokens_of(ids: Tensor) -> list[int]:
    """(B,) int64 as a list."""
    tokens: list[int] = ids.tolist()
    return tokens


@torch.inference_mode()
def logprobs_of(logits: Tensor, tokens: list[int]) -> list[float]:
    """The natural logarithm of each token's probability in its row of `logits` (B, V)."""
    chosen = torch.tensor(tokens)[:, None]  # (B, 1)
    found: list[float] = logits.cpu().double().log_softmax(-1).gather(-1, chosen)[:, 0].tolist()
    return found
