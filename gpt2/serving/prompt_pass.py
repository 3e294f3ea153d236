"""A pass over a prompt in parts: log-probabilities of its tokens, its embedding, or its keys and values.

Each function is a generator that yields between two parts, so that other rows can run, and returns its result. `part` is
called for the number of tokens of each part. This module knows models and ids only.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt2.dropout import in_mode
from gpt2.evaluation.embedding import unit_length
from gpt2.fast.plan import DecodePlan, cache_dtype
from gpt2.fast.threads import adjusted_threads, step
from gpt2.generation.network import CalledModel, network_of
from gpt2.generation.prefix_cache import Prefix, PrefixCache
from gpt2.generation.sampling import check_finite, top_logprobs_of
from gpt2.kv_cache import KVCache
from gpt2.model import GPT2

# Rows of logits in memory at once: 32 of 50,257 numbers in float64 are 13 MB.
_ROWS = 32

Top = list[tuple[int, float]]
Network = GPT2 | CalledModel | DecodePlan


@dataclass
class PromptScores:
    """Log-probabilities of the tokens of a prompt from the second one on, natural logarithms, computed in float64.

    `top` has the most probable ids at each of these places. `last_logits` (1, V) are those of the token after the prompt.
    """

    logprobs: list[float] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)
    last_logits: Tensor = field(default_factory=lambda: torch.empty(0))


def score_prompt(
    model: GPT2, ids: Sequence[int], n_top: int, *, vocab_size: int, part: Callable[[], int]
) -> Generator[None, None, PromptScores]:
    """Return the scores of a prompt. Raises CheckpointError if the model computes NaN."""
    scores, network, n_done = PromptScores(), network_of(model), 0
    for hidden in _hidden_states(model, ids, _new_cache(model, len(ids)), part):
        targets = list(ids[n_done + 1 : n_done + 1 + len(hidden)])
        _look_up(scores, network.logits, hidden, targets, n_top, vocab_size)
        n_done += len(hidden)
        yield
    return scores


@torch.inference_mode()
def _look_up(
    scores: PromptScores,
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: list[int],
    n_top: int,
    vocab_size: int,
) -> None:
    """Append the scores of `targets` from hidden states (R, C); one row more than targets is that after the prompt."""
    for begin in range(0, len(hidden), _ROWS):
        logits = head(hidden[begin : begin + _ROWS])  # (R, V)
        check_finite(logits)
        wanted = targets[begin : begin + _ROWS]
        if len(wanted) < len(logits):
            scores.last_logits = logits[-1:].clone()
        if not wanted:
            continue
        logits = logits[: len(wanted)]
        logprobs = logits.cpu().double().log_softmax(-1)
        scores.logprobs += logprobs.gather(-1, torch.tensor(wanted)[:, None])[:, 0].tolist()
        scores.top += top_logprobs_of(logits, n_top, vocab_size) if n_top else [[] for _ in wanted]


def embed_prompt(model: GPT2, ids: Sequence[int], *, part: Callable[[], int]) -> Generator[None, None, list[float]]:
    """Return the mean over the tokens of the hidden states after `ln_f`, in float32, scaled to length 1."""
    total = torch.zeros(model.config.n_embd, dtype=torch.float64)
    for hidden in _hidden_states(model, ids, _new_cache(model, len(ids)), part):
        total += hidden.double().sum(0).cpu()
        yield
    vector: list[float] = unit_length(total).float().tolist()
    return vector


def compute_beginning(
    model: GPT2,
    ids: Sequence[int],
    prefixes: PrefixCache,
    *,
    part: Callable[[], int],
    take_along: Callable[[Sequence[int], KVCache], bool],
) -> Generator[None, None, Prefix]:
    """Return the keys and values of a prompt without its last tokens, of which there are at most as many as a part has.

    Those are computed when its row begins. What `prefixes` has of the prompt is copied. `take_along` may let the next step
    of running rows compute a part: it returns whether it does, and the step advances the cache.
    """
    cache = KVCache(model.config, max_length=len(ids), device=model.device, dtype=cache_dtype(model))
    n_known, kept = prefixes.find(ids[:-1])
    if kept is not None:
        Prefix(kept.ids[:n_known], [layer[:, :, :n_known] for layer in kept.layers]).fill(cache)
    network = DecodePlan(model, only_last=True) if DecodePlan.fits(model) else network_of(model)
    while (n_left := len(ids) - cache.length) > 1:
        n_tokens, done = part(), cache.length
        if not take_along(ids[done : done + min(n_tokens, n_left - 1)], cache):
            if n_left <= n_tokens:
                break
            _advance(model, network, ids[done : done + n_tokens], cache)
        yield
    return Prefix.of_row(cache, 0, tuple(ids[: cache.length]), cache.length)


def _new_cache(model: GPT2, n_tokens: int) -> KVCache:
    return KVCache(model.config, max_length=n_tokens, device=model.device, dtype=model.dtype)


def _hidden_states(model: GPT2, ids: Sequence[int], cache: KVCache, part: Callable[[], int]) -> Iterator[Tensor]:
    """Yield the hidden states (R, C) of the next tokens of a prompt, after those in `cache`."""
    while cache.length < len(ids):
        yield _advance(model, network_of(model), ids[cache.length : cache.length + part()], cache)


@torch.inference_mode()
def _advance(model: GPT2, network: Network, ids: Sequence[int], cache: KVCache) -> Tensor:
    input_ids = torch.tensor([ids], device=model.device)
    kind = (id(model), "prompt pass", len(ids).bit_length())
    with adjusted_threads(model.device), in_mode(model, is_training=False), step(kind, model.device, work=len(ids)):
        return network.hidden_states(input_ids, attention_mask=None, kv_cache=cache)[0]
