"""Log-probabilities of given continuations of given contexts; every task uses it. It knows token ids, not text.

Tokens that several continuations share, their context and a common prefix, are computed once. They start a row of input, and
the rest of each continuation, its branch, follows in the same row. Every token has the position that it has in its own text,
and a mask hides the other branches from it. Logits are computed only where a token is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.dropout import in_mode
from gpt2.evaluation.figures import check_not_nan
from gpt2.evaluation.windows import at_least_float32
from gpt2.fast.threads import step
from gpt2.model import GPT2
from gpt_config.errors import InputError
from gpt_config.validation import check_whole


@dataclass(frozen=True)
class ScoringLimits:
    """How requests are split into parts. The values change scores only by rounding."""

    tokens: int = 512  # tokens in a batch of short rows; matrix products over fewer are slower per token
    rows: int = 1024  # rows of logits in memory at once
    tokens_between: int = 8192  # tokens computed between two reports of progress
    softmax_rows: int = 32  # rows of logits per softmax, which is faster if they fit into a CPU's caches


class Request(NamedTuple):
    """Continuations of one context, as token ids. An empty context means the model's bos_token_id, `<|endoftext|>`."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Score(NamedTuple):
    """The score of one continuation."""

    log_prob: float  # sum of the natural logarithms of its tokens' probabilities
    is_greedy: bool  # whether each of its tokens is the most probable one
    n_tokens: int


@dataclass
class _Row:
    """A row of input: a context, the tokens that all its continuations share, then the branches, the rest of each."""

    ids: list[int]
    positions: list[int]
    branches: list[int]  # the branch of each token, from 1; 0 for context and shared tokens
    n_context: int
    wanted: list[_Wanted]  # each token from the end of the context on predicts one or several of these


class _Wanted(NamedTuple):
    """A log-probability to look up: of token `target` in row `row` of the logits, added to the score at index `place`."""

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
    """The Score of each continuation, one list per request, in order. Dropout is off in either mode of the model.

    Up to `batch_size` sequences of similar length are computed at once, or more if they are short; a batch never needs more
    memory than `batch_size` full windows. Other texts in the batch change a score only by rounding. `progress` is called
    with the number of continuations completed since its last call. Exponentials are computed in float32, or in the model's
    dtype if that is wider; log-probabilities and their sums are in float64.

    If a text is too long, the model sees its last n_positions + 1 tokens, the last one only as a target, as in
    lm-evaluation-harness. A continuation of more than n_positions tokens is scored in parts of n_positions / 2 tokens, each
    after as many earlier tokens as fit.

    InputError for an empty continuation, an id outside the vocabulary, or an empty context if the model has no bos_token_id;
    ConfigError if `batch_size` is invalid; CheckpointError if the model computes NaN.
    """
    check_whole("batch_size", batch_size, 1)
    limits = limits or ScoringLimits()
    lengths = [[len(continuation) for continuation in request.continuations] for request in requests]
    rows: list[_Row] = []
    n_scores = 0
    for request in requests:
        rows += _rows(request, n_scores, model)
        n_scores += len(request.continuations)
    rows.sort(key=lambda row: len(row.ids), reverse=True)  # longest first, so that a lack of memory shows at once
    totals, n_misses = torch.zeros(n_scores, dtype=torch.float64), torch.zeros(n_scores, dtype=torch.int64)
    n_left = torch.tensor([n for row in lengths for n in row], dtype=torch.int64)
    with in_mode(model, is_training=False):
        for hidden, wanted in _scored_states(model, rows, batch_size, limits):
            with step((id(model), "scores"), model.device, work=len(hidden)):
                log_probs, is_miss, places = _look_up(model, hidden, wanted, limits)
            totals.index_add_(0, places, log_probs)
            n_misses.index_add_(0, places, is_miss)
            n_open = int(n_left.count_nonzero())
            n_left.index_add_(0, places, torch.full_like(places, -1))
            progress(n_open - int(n_left.count_nonzero()))
    check_not_nan(float(totals.sum()))
    found = iter(zip(totals.tolist(), n_misses.tolist(), strict=True))
    return [[Score(total, misses == 0, n) for n, (total, misses) in zip(row, found, strict=False)] for row in lengths]


def _rows(request: Request, place: int, model: GPT2) -> Iterator[_Row]:
    """The rows of a request, nearly always one. A long continuation sees less of the context and needs another row."""
    limit, first = model.config.n_positions, model.config.bos_token_id
    context = list(request.context) or ([] if first is None else [first])
    if not context:
        raise InputError("a context is empty, and this model has no bos_token_id to replace it: give at least one token")
    views: dict[tuple[int, ...], list[tuple[Sequence[int], int]]] = {}
    for number, continuation in enumerate(request.continuations, place):
        if not continuation:
            raise InputError("a continuation is empty, so there is nothing to score: give at least one token")
        for before, part in _parts(continuation, limit):
            view = tuple([*context, *before][-(limit + 1 - len(part)) :])
            views.setdefault(view, []).append((part, number))
    for view, continuations in views.items():
        yield from _rows_of_view(view, continuations, limit)


def _parts(continuation: Sequence[int], limit: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(tokens already scored, next tokens to score) of a continuation; half windows if it is longer than a window."""
    size = len(continuation) if len(continuation) <= limit else max(1, limit // 2)
    for start in range(0, len(continuation), size):
        yield continuation[:start], continuation[start : start + size]


def _rows_of_view(context: tuple[int, ...], continuations: list[tuple[Sequence[int], int]], limit: int) -> Iterator[_Row]:
    """The rows for one visible context: nearly always one. A row with several branches is never longer than a window."""
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
        begin = len(row.ids) - len(context) + 1  # the logits row at the first token of the branch
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
    """Hidden states (R, C) and the log-probabilities to look up in their logits. Several batches together are faster."""
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
    """GPT2.hidden_states (B, T, C), except that a token sees no other branch than its own and has its position there."""
    device = model.device
    input_ids, positions = _padded([row.ids for row in rows]), _padded([row.positions for row in rows])  # (B, T)
    _check_ids(input_ids, model.config.vocab_size)
    mask = None  # causal attention; padding comes after the tokens, so they do not see it
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
    """For each wanted token: its log-probability (float64), 1 if it is not the argmax, else 0 (int64), its score's index."""
    rows, targets, places = torch.tensor(wanted).unbind(1)
    _check_ids(targets, model.config.vocab_size)
    log_probs, is_miss = torch.zeros(len(wanted), dtype=torch.float64), torch.zeros(len(wanted), dtype=torch.int64)
    start = 0
    for states in hidden.split(limits.rows):
        for logits in model.logits(states).split(limits.softmax_rows):
            largest, log_sums, best = _log_sums(logits)
            is_here = (rows >= start) & (rows < start + len(logits))
            here, target = rows[is_here] - start, targets[is_here]
            chosen = logits[here.to(logits.device), target.to(logits.device)].cpu().double()
            log_probs[is_here] = chosen - largest[here] - log_sums[here]
            is_miss[is_here] = (best[here] != target).long()
            start += len(logits)
    return log_probs, is_miss, places


def _log_sums(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of logits (R, V): the largest, the log of the sum of exp(logit - largest), both float64, and the argmax.

    A log-probability in float32 is rounded to about 5e-7, which adds up over the tokens of a text. So the logarithm and the
    differences are in float64; the sum of positive numbers in float32 is precise enough.
    """
    largest, best = logits.max(-1)  # (R,)
    sums = (at_least_float32(logits) - at_least_float32(largest)[:, None]).exp_().sum(-1)
    return largest.cpu().double(), sums.cpu().double().log(), best.cpu()


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.numel():
        raise InputError.of_token(int(wrong[0]), vocab_size)
