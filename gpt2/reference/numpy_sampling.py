"""From logits to the next token in NumPy: pure functions on a batch. They know nothing of models or text.

Each `apply_` function takes logits (B, V) and returns logits (B, V), in which -inf marks an excluded token. Penalties come
first; `logits_to_probs` has the order of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt_config.generation_config import GenerationConfig

Array = np.ndarray[Any, np.dtype[Any]]
Ids = Sequence[Sequence[int]]


def apply_repetition_penalty(logits: Array, seen_ids: Ids, penalty: float) -> Array:
    """For the tokens in each row of `seen_ids`: divide positive logits by `penalty`, multiply negative logits by it.

    A token is penalised once, no matter how often it occurs. Keskar et al. 2019, section 4.1.
    """
    out = logits.copy()
    for row, ids in zip(out, seen_ids, strict=True):
        seen = np.unique(np.asarray(ids, dtype=np.int64))
        scores = row[seen]
        with np.errstate(all="ignore"):
            row[seen] = _finite(np.where(scores < 0, scores * penalty, scores / penalty), scores)
    return out


def _finite(changed: Array, logits: Array) -> Array:
    """`changed` with the largest number in place of infinity, whose softmax is NaN. What is excluded from `logits` stays."""
    largest = np.finfo(logits.dtype).max
    return np.where(logits == -np.inf, logits, changed.clip(-largest, largest))


def apply_frequency_penalty(logits: Array, seen_ids: Ids, penalty: float) -> Array:
    """Subtract `penalty` from a token's logit for each time it occurs in its row of `seen_ids`.

    Together with `apply_presence_penalty`, these are the penalties of OpenAI's API:
    logit - count * frequency_penalty - (count > 0) * presence_penalty.
    """
    with np.errstate(over="ignore"):
        return _finite(logits - penalty * _counts(logits, seen_ids), logits)


def apply_presence_penalty(logits: Array, seen_ids: Ids, penalty: float) -> Array:
    """Subtract `penalty` once from the logit of each token that occurs in its row of `seen_ids`."""
    with np.errstate(over="ignore"):
        return _finite(logits - penalty * (_counts(logits, seen_ids) > 0), logits)


def _counts(logits: Array, seen_ids: Ids) -> Array:
    n = logits.shape[-1]
    return np.stack([np.bincount(np.asarray(ids, dtype=np.int64), minlength=n)[:n] for ids in seen_ids])


def apply_logit_bias(logits: Array, bias: Sequence[tuple[int, float]]) -> Array:
    """Add a number to the logit of each id in `bias`; -inf excludes the token."""
    out = logits.copy()
    for token, number in bias:
        if token < logits.shape[-1]:
            out[:, token] += number
    return out


def without(logits: Array, ids: Sequence[int]) -> Array:
    """Exclude the tokens `ids` from each row."""
    out = logits.copy()
    out[:, [token for token in ids if token < logits.shape[-1]]] = -np.inf
    return out


def apply_temperature(logits: Array, temperature: float) -> Array:
    """Divide by `temperature`. The largest logit of a row is subtracted first, so that no positive temperature overflows."""
    divided: Array = (logits - logits.max(-1, keepdims=True)) / temperature
    return divided


def apply_top_k(logits: Array, top_k: int | None) -> Array:
    """Keep the `top_k` largest logits, and all that equal the smallest of them (Fan et al. 2018).

    None, and a number above the vocabulary, keep all.
    """
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    smallest_kept = np.partition(logits, -top_k, axis=-1)[..., -top_k, None]
    return np.where(logits < smallest_kept, -np.inf, logits)


def apply_top_p(logits: Array, top_p: float | None) -> Array:
    """Keep the smallest set of tokens whose total probability reaches `top_p` (nucleus sampling, Holtzman et al. 2019)."""
    if top_p is None or top_p == 1:
        return logits
    probs = softmax(logits)
    order = np.argsort(-probs, axis=-1, kind="stable")
    descending = np.take_along_axis(probs, order, -1)
    before = np.cumsum(descending, -1) - descending  # total probability of the more probable tokens
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, order, before < top_p, -1)
    return np.where(kept, logits, -np.inf)


def apply_min_p(logits: Array, min_p: float | None) -> Array:
    """Keep the tokens that are at least `min_p` times as probable as the most probable one (Nguyen et al. 2024)."""
    if not min_p:
        return logits
    probs = softmax(logits)
    return np.where(probs < min_p * probs.max(-1, keepdims=True), -np.inf, logits)


def apply_typical_p(logits: Array, typical_p: float | None) -> Array:
    """Keep the tokens with a log-probability closest to the entropy, until `typical_p` is reached (Meister et al. 2022)."""
    if typical_p is None or typical_p == 1:
        return logits
    probs = softmax(logits)
    surprise = -np.log(probs, where=probs > 0, out=np.full(probs.shape, -np.inf))
    entropy = (probs * np.where(probs > 0, surprise, 0)).sum(-1, keepdims=True)
    distance = np.abs(surprise - entropy)
    order = np.argsort(distance, axis=-1, kind="stable")
    n_before = (np.cumsum(np.take_along_axis(probs, order, -1), -1) < typical_p).sum(-1, keepdims=True)
    last = np.take_along_axis(order, np.minimum(n_before, logits.shape[-1] - 1), -1)
    return np.where(distance > np.take_along_axis(distance, last, -1), -np.inf, logits)


def softmax(logits: Array) -> Array:
    """Logits (..., V) to probabilities (..., V), in float64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probs: Array = exponentials / exponentials.sum(-1, keepdims=True)
    return probs


def logits_to_probs(logits: Array, config: GenerationConfig) -> Array:
    """The distribution to draw from, float64 (B, V).

    The temperature comes first, so that the others apply to the distribution that is drawn from.
    """
    logits = apply_temperature(logits.astype(np.float64), config.temperature)
    logits = apply_top_k(logits, config.top_k)
    logits = apply_top_p(logits, config.top_p)
    logits = apply_min_p(logits, config.min_p)
    logits = apply_typical_p(logits, config.typical_p)
    return softmax(logits)


def sample(probs: Array, uniforms: Sequence[float]) -> Array:
    """One token per row, int64 (B,): the first whose cumulative probability exceeds the row's uniform number from [0, 1)."""
    cumulative = np.cumsum(probs, -1)
    # In float64, the total times a number below 1 is below the total, which the last possible token reaches.
    thresholds = np.asarray(uniforms) * cumulative[:, -1]
    ids: Array = (cumulative <= thresholds[:, None]).sum(-1)
    return ids


def greedy(logits: Array) -> Array:
    """The most probable token of each row, int64 (B,)."""
    ids: Array = logits.argmax(-1)
    return ids
