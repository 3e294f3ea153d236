"""How probable a model finds given continuations of given contexts: every task uses it. It knows ids, not text.

What several continuations share, their context and the tokens with which all of them begin, is computed once: the rest of
each stands after it in one row of input, at the positions that it has after the context, and the rests do not see each
other. Logits are computed only where a token is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.evaluation.windows import at_least_float32
from gpt2.fast.threads import step
from gpt2.model import GPT2
from gpt_config.errors import CheckpointError, InputError
from gpt_config.validation import check_whole


@dataclass(frozen=True)
class ScoringLimits:
    """How requests are computed in parts. The values change scores by rounding only."""

    tokens: int = 512  # of a batch of short rows: products over fewer are slower per token
    rows: int = 1024  # of logits that are held at once
    tokens_between: int = 8192  # computed at most before scores are looked up, so that progress is seen
    softmax_rows: int = 32  # of one softmax, which is faster where it fits a CPU's caches


class Request(NamedTuple):
    """Continuations of one context, as token ids. An empty context is the model's bos_token_id, `<|endoftext|>`."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Score(NamedTuple):
    """Of one continuation: the sum of the natural logarithms of its tokens' probabilities, and more."""

    log_prob: float
    is_greedy: bool  # every token is the most probable one
    n_tokens: int


@dataclass
class _Row:
    """A row of input: a context, the tokens that all its continuations share, and branches, which are the rest of each."""

    ids: list[int]
    positions: list[int]
    branches: list[int]  # which branch each token is part of; 0 is none
    n_context: int
    wanted: list[_Wanted]  # each slot from the context's last on is the row of one of them, or of several


class _Wanted(NamedTuple):
    """A logarithm to look up: of token `target`, in logits row `row`, for the score at `place`."""

    row: int
    target: int
    place: int


@torch.inference_mode()
def log_likelihoods(
    model: GPT2,
    requests: Sequence[Request],
    *,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda n_continuations: None,
    limits: ScoringLimits | None = None,
) -> list[list[Score]]:
    """The Score of each continuation of each request, in their order. Dropout is off whatever mode the model is in.

    Up to `batch_size` sequences are computed at once, or more if they are short, with those of like length; they never
    take the memory of more than `batch_size` full windows. What is beside a text changes its scores by rounding only.
    `progress` is told of continuations done. A softmax is in float32 or the model's dtype if that is wider;
    sums are in float64.

    Of what does not fit, the model sees the last n_positions + 1 tokens, the last only as a target, as lm-evaluation-harness
    does. A continuation of more than n_positions tokens is scored in parts of half as many, each with as much before it
    as fits. InputError for an empty continuation, ids outside the vocabulary, or an empty context where the model has no
    bos_token_id; CheckpointError if the model computes NaN.
    """
    check_whole("batch_size", batch_size, 1)
    limits = limits or ScoringLimits()
    lengths = [[len(continuation) for continuation in request.continuations] for request in requests]
    rows: list[_Row] = []
    n_scores = 0
    for request in requests:
        rows += _rows(request, n_scores, model)
        n_scores += len(request.continuations)
    rows.sort(key=lambda row: len(row.ids), reverse=True)  # the longest first: if memory fails, then at once
    totals, n_misses = torch.zeros(n_scores, dtype=torch.float64), torch.zeros(n_scores, dtype=torch.int64)
    n_left = torch.tensor([n for row in lengths for n in row], dtype=torch.int64)
    was_training = model.training
    model.eval()
    try:
        for hidden, wanted in _scored_states(model, rows, batch_size, limits):
            with step((id(model), "scores"), model.device, work=len(hidden)):
                log_probs, is_miss, places = _look_up(model, hidden, wanted, limits)
            totals.index_add_(0, places, log_probs)
            n_misses.index_add_(0, places, is_miss)
            n_open = int(n_left.count_nonzero())
            n_left.index_add_(0, places, torch.full_like(places, -1))
            progress(n_open - int(n_left.count_nonzero()))
    finally:
        model.train(was_training)
    if bool(totals.isnan().any()):
        raise CheckpointError("the model computes NaN: its weights are damaged, or its dtype too small")
    found = iter(zip(totals.tolist(), n_misses.tolist(), strict=True))
    return [[Score(total, misses == 0, n) for n, (total, misses) in zip(row, found, strict=False)] for row in lengths]


def _rows(request: Request, place: int, model: GPT2) -> Iterator[_Row]:
    """A row for each view of the context: one for all continuations, but where long ones push some of it out of view."""
    limit, first = model.config.n_positions, model.config.bos_token_id
    context = list(request.context) or ([] if first is None else [first])
    if not context:
        raise InputError("a context is empty and this model has no bos_token_id to start from: give it a token")
    views: dict[tuple[int, ...], list[tuple[Sequence[int], int]]] = {}
    for number, continuation in enumerate(request.continuations, place):
        if not continuation:
            raise InputError("a continuation is empty: there is nothing to score")
        for before, part in _parts(continuation, limit):
            view = tuple([*context, *before][-(limit + 1 - len(part)) :])
            views.setdefault(view, []).append((part, number))
    for view, continuations in views.items():
        yield from _rows_of_view(view, continuations, limit)


def _parts(continuation: Sequence[int], limit: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(what of the continuation is already scored, what is next), by half windows where it is longer than a window."""
    size = len(continuation) if len(continuation) <= limit else max(1, limit // 2)
    for start in range(0, len(continuation), size):
        yield continuation[:start], continuation[start : start + size]


def _rows_of_view(context: tuple[int, ...], continuations: list[tuple[Sequence[int], int]], limit: int) -> Iterator[_Row]:
    """Nearly always one row; so many that none is longer than a window if there are several branches in it."""
    first, n_shared = continuations[0][0], 0
    while all(len(ids) > n_shared + 1 and ids[n_shared] == first[n_shared] for ids, _ in continuations):
        n_shared += 1
    stem = [*context, *first[:n_shared]]
    row = _new_row(stem, len(context))
    for continuation, place in continuations:
        branch = continuation[n_shared:-1]
        if len(stem) < len(row.ids) and len(row.ids) + len(branch) > limit:
            yield row
            row = _new_row(stem, len(context))
        begin = len(row.ids) - len(context) + 1  # the logits row of the first token of the branch
        row.wanted += [_Wanted(n, target, place) for n, target in enumerate(continuation[: n_shared + 1])]
        row.wanted += [_Wanted(n, target, place) for n, target in enumerate(continuation[n_shared + 1 :], begin)]
        row.ids += branch
        row.positions += range(len(stem), len(stem) + len(branch))
        row.branches += [max(row.branches) + 1] * len(branch)
    yield row


def _new_row(stem: list[int], n_context: int) -> _Row:
    return _Row(list(stem), list(range(len(stem))), [0] * len(stem), n_context, [])


def _scored_states(
    model: GPT2, rows: list[_Row], batch_size: int, limits: ScoringLimits
) -> Iterator[tuple[Tensor, list[_Wanted]]]:
    """Hidden states (R, C) and what is wanted of their logits; of several batches together, because that is faster."""
    held: list[Tensor] = []
    wanted: list[_Wanted] = []
    n_rows = n_computed = start = 0
    while start < len(rows):
        width = len(rows[start].ids)
        size = max(batch_size, min(limits.tokens, batch_size * model.config.n_positions) // width)
        batch = rows[start : start + size]
        start += size
        n_tokens = len(batch) * width
        with step((id(model), "states", n_tokens.bit_length()), model.device, work=n_tokens):
            hidden = _hidden_states(model, batch)  # (B, T, C)
        for states, row in zip(hidden, batch, strict=True):
            held.append(states[row.n_context - 1 : len(row.ids)].clone())  # a view would keep all of `hidden`
            wanted += [want._replace(row=want.row + n_rows) for want in row.wanted]
            n_rows += len(held[-1])
        n_computed += hidden.shape[:2].numel()
        if n_rows >= limits.rows or n_computed >= limits.tokens_between or start >= len(rows):
            yield torch.cat(held), wanted
            held, wanted, n_rows, n_computed = [], [], 0, 0


def _hidden_states(model: GPT2, rows: list[_Row]) -> Tensor:
    """GPT2.hidden_states (B, T, C), but a token does not see other branches than its own, and takes its position there."""
    device = model.device
    input_ids, positions = _padded([row.ids for row in rows]), _padded([row.positions for row in rows])  # (B, T)
    _check_ids(input_ids, model.config.vocab_size)
    mask = None  # causal attention: padding stands after the tokens, which do not see it
    if any(row.branches[-1] for row in rows):
        branches = _padded([row.branches for row in rows])
        is_before = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
        mask = is_before & ((branches[:, None] == 0) | (branches[:, None] == branches[:, :, None]))
        mask = mask[:, None].to(device)  # (B, 1, T, T)
    return model.stream(model.embed(input_ids.to(device), positions.to(device)), mask, None)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64)


def _look_up(model: GPT2, hidden: Tensor, wanted: list[_Wanted], limits: ScoringLimits) -> tuple[Tensor, Tensor, Tensor]:
    """For each wanted token: its log-probability (float64), whether it is not the most probable (int64), its place."""
    rows, targets, places = torch.tensor(wanted).unbind(1)
    _check_ids(targets, model.config.vocab_size)
    log_probs, is_miss = torch.zeros(len(wanted), dtype=torch.float64), torch.zeros(len(wanted), dtype=torch.int64)
    start = 0
    for states in hidden.split(limits.rows):
        for logits in model.logits(states).split(limits.softmax_rows):
            found = at_least_float32(logits).log_softmax(-1)  # (R, V)
            is_here = (rows >= start) & (rows < start + len(found))
            here, target = (rows[is_here] - start).to(found.device), targets[is_here].to(found.device)
            log_probs[is_here] = found[here, target].cpu().double()
            is_miss[is_here] = (found.argmax(-1)[here] != target).long().cpu()
            start += len(found)
    return log_probs, is_miss, places


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.numel():
        raise InputError.of_token(int(wrong[0]), vocab_size)
