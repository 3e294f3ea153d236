"""Measures of attention patterns: entropy, rollout, and how far heads attend to the tokens that a rule names.

They depend on traces only, and need `hook_pattern` of all layers.
L: layers, B: rows, H: heads, T: tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.inspection.tracing import Trace
from gpt_config.errors import InputError


def attention_entropy(trace: Trace) -> Tensor:
    """Return the entropy of the pattern of each token in each head, in nats: (L, B, H, T).

    It is 0 if a token attends to one token, and ln(n) if it attends to n tokens equally.
    """
    entropy: Tensor = torch.special.entr(trace.stack("hook_pattern")).sum(-1)
    return entropy


def attention_rollout(trace: Trace, *, residual: float = 0.5) -> Tensor:
    """Return how much of each token's stream comes from each token of the input, after each layer: (L, B, T, T).

    A layer passes on the share `residual` of a token's own stream, and takes the rest from the tokens to which its heads
    attend on average; the layers are multiplied. Rows have the sum 1. Abnar and Zuidema 2020, section 3.
    """
    if not 0 <= residual <= 1:
        raise InputError(f"residual={residual} must be from 0 to 1")
    patterns = trace.stack("hook_pattern").mean(2)  # (L, B, T, T)
    itself = torch.eye(patterns.shape[-1], dtype=patterns.dtype, device=patterns.device)
    rolled = [itself.expand(patterns.shape[1:])]
    for pattern in patterns:
        rolled.append((residual * itself + (1 - residual) * pattern) @ rolled[-1])
    return torch.stack(rolled[1:])


def head_scores(trace: Trace, targets: Tensor) -> Tensor:
    """Return the attention of each head to `targets`, bool (B, T, T): (L, H), from 0 to 1.

    `targets[b, t, s]` is True if token t should attend to token s. The score is the mean, over all tokens that have a
    target, of the attention to their targets; NaN if no token has one.
    """
    tokens = trace.mask
    targets = targets & tokens[:, :, None] & tokens[:, None, :]
    to_targets = (trace.stack("hook_pattern") * targets[:, None]).sum(-1)  # (L, B, H, T)
    return to_targets.sum((1, 3)) / targets.any(-1).sum()


def previous_token_scores(trace: Trace) -> Tensor:
    """Return the mean attention of each head to the token before: (L, H)."""
    return head_scores(trace, previous_tokens(trace))


def duplicate_token_scores(trace: Trace) -> Tensor:
    """Return the mean attention to earlier occurrences of the same token, over the tokens that have one: (L, H)."""
    return head_scores(trace, duplicate_tokens(trace))


def induction_scores(trace: Trace) -> Tensor:
    """Return the mean attention to the tokens that followed earlier occurrences of the same token: (L, H).

    It counts the tokens that have occurred before. Give it repeated random tokens (`repeated_tokens`): a head that continues
    what it has seen has a score near 1 there. Olsson et al. 2022, "In-context learning and induction heads".
    """
    return head_scores(trace, tokens_after_duplicates(trace))


def previous_tokens(trace: Trace) -> Tensor:
    """Return which token is just before which: bool (B, T, T), for `head_scores`. Padding is no token."""
    places = trace.mask.long().cumsum(-1)
    return (places[:, None, :] == places[:, :, None] - 1) & trace.mask[:, None, :]


def duplicate_tokens(trace: Trace) -> Tensor:
    """Return which earlier tokens are equal to which: bool (B, T, T), for `head_scores`."""
    equal = trace.ids[:, :, None] == trace.ids[:, None, :]
    return equal.tril(-1) & trace.mask[:, None, :]


def tokens_after_duplicates(trace: Trace) -> Tensor:
    """Return which tokens come just after an earlier token that is equal to which: bool (B, T, T), for `head_scores`."""
    return (duplicate_tokens(trace).float() @ previous_tokens(trace).float().transpose(1, 2)) > 0


def repeated_tokens(vocab_size: int, n: int, *, rows: int = 1, seed: int = 0, first: int | None = None) -> Tensor:
    """Return `n` distinct random ids, twice: int64 (rows, 2 n). `first` is an id to begin each row with: (rows, 1 + 2 n).

    Raises InputError if the vocabulary has fewer than `n` ids.
    """
    if not 0 < n <= vocab_size:
        raise InputError(f"n={n} must be from 1 to the {vocab_size} ids of the vocabulary")
    generator = torch.Generator().manual_seed(seed)
    half = torch.stack([torch.randperm(vocab_size, generator=generator)[:n] for _ in range(rows)])
    twice = torch.cat([half, half], 1)
    return twice if first is None else torch.cat([torch.full((rows, 1), first), twice], 1)
