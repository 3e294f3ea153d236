"""How probable a model finds given continuations of given contexts: what every task rests on. It knows ids, not text.

What several continuations share, their context and the tokens with which all of them begin, is computed once; its keys and
values are then copied for each of them. Logits are computed only where a token is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.evaluation.windows import at_least_float32
from gpt2.kv_cache import KVCache
from gpt2.model import GPT2
from gpt_config.errors import CheckpointError, InputError
from gpt_config.validation import check_whole

_ROWS = 256  # rows of logits that are held at once


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
class _Stem:
    """A context with the tokens that continuations share, and the rest of each, which has a token or more.

    `places` says which scores the rests belong to.
    """

    ids: list[int]
    n_context: int
    rests: list[Sequence[int]]
    places: list[int]


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
) -> list[list[Score]]:
    """The Score of each continuation of each request, in their order. Dropout is off whatever mode the model is in.

    Up to `batch_size` sequences are computed at once, those of like length together; that changes no score by more than
    rounding. `progress` is told of continuations done. A softmax is in float32 or the model's dtype if that is wider;
    sums are in float64.

    Of what does not fit, the model sees the last n_positions + 1 tokens, the last only as a target, as lm-evaluation-harness
    does. A continuation of more than n_positions tokens is scored in parts of half as many, each with as much before it
    as fits. InputError for an empty continuation, ids outside the vocabulary, or an empty context where the model has no
    bos_token_id; CheckpointError if the model computes NaN.
    """
    check_whole("batch_size", batch_size, 1)
    lengths = [[len(continuation) for continuation in request.continuations] for request in requests]
    stems, n_scores = [], 0
    for request in requests:
        stems += _stems(request, n_scores, model)
        n_scores += len(request.continuations)
    stems.sort(key=lambda stem: len(stem.ids), reverse=True)  # the longest first: if memory fails, then at once
    totals, n_misses = torch.zeros(n_scores, dtype=torch.float64), torch.zeros(n_scores, dtype=torch.int64)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(stems), batch_size):
            batch = stems[start : start + batch_size]
            for log_probs, is_miss, places in _batch_scores(model, batch, batch_size):
                totals.index_add_(0, places, log_probs)
                n_misses.index_add_(0, places, is_miss)
            progress(sum(len(stem.rests) for stem in batch))
    finally:
        model.train(was_training)
    if bool(totals.isnan().any()):
        raise CheckpointError("the model computes NaN: its weights are damaged, or its dtype too small")
    found = iter(zip(totals.tolist(), n_misses.tolist(), strict=True))
    return [[Score(total, misses == 0, n) for n, (total, misses) in zip(row, found, strict=False)] for row in lengths]


def _stems(request: Request, place: int, model: GPT2) -> list[_Stem]:
    """A stem for each view of the context: one for all continuations, but where long ones push some of it out of view."""
    limit, first = model.config.n_positions, model.config.bos_token_id
    context = list(request.context) or ([] if first is None else [first])
    if not context:
        raise InputError("a context is empty and this model has no bos_token_id to start from: give it a token")
    views: dict[tuple[int, ...], tuple[list[Sequence[int]], list[int]]] = {}
    for number, continuation in enumerate(request.continuations):
        if not continuation:
            raise InputError("a continuation is empty: there is nothing to score")
        for before, part in _parts(continuation, limit):
            view = tuple([*context, *before][-(limit + 1 - len(part)) :])
            parts, places = views.setdefault(view, ([], []))
            parts.append(part)
            places.append(place + number)
    return [_stem(view, *group) for view, group in views.items()]


def _parts(continuation: Sequence[int], limit: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(what of the continuation is already scored, what is next), by half windows where it is longer than a window."""
    size = len(continuation) if len(continuation) <= limit else max(1, limit // 2)
    for start in range(0, len(continuation), size):
        yield continuation[:start], continuation[start : start + size]


def _stem(context: tuple[int, ...], continuations: list[Sequence[int]], places: list[int]) -> _Stem:
    n_shared = 0
    while all(len(c) > n_shared + 1 and c[n_shared] == continuations[0][n_shared] for c in continuations):
        n_shared += 1
    ids = [*context, *continuations[0][:n_shared]]
    return _Stem(ids, len(context), [c[n_shared:] for c in continuations], places)


def _batch_scores(model: GPT2, stems: list[_Stem], batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What `_look_up` gives, for the stems and the first token of each rest, then for the other tokens of the rests."""
    width = len(stems[0].ids)
    device, dtype = model.wte.weight.device, model.wte.weight.dtype
    branches = [(row, rest, place) for row, stem in enumerate(stems) for rest, place in _branches(stem)]
    cache = None
    if branches:
        cache = KVCache(model.config, batch_size=len(stems), max_length=width, device=device, dtype=dtype)
    # Padding behind the tokens needs no mask: a token sees only what stands before it.
    hidden = model.hidden_states(_padded([stem.ids for stem in stems], device), kv_cache=cache)
    is_scored, wanted, n_rows = torch.zeros(hidden.shape[:2], dtype=torch.bool), [], 0
    for row, stem in enumerate(stems):
        is_scored[row, stem.n_context - 1 : len(stem.ids)] = True
        shared = stem.ids[stem.n_context :]
        for rest, place in zip(stem.rests, stem.places, strict=True):
            wanted += [_Wanted(n_rows + i, target, place) for i, target in enumerate([*shared, rest[0]])]
        n_rows += len(shared) + 1
    yield _look_up(model, hidden[is_scored.to(device)], wanted)
    branches.sort(key=lambda branch: len(branch[1]), reverse=True)
    lengths = torch.tensor([len(stem.ids) for stem in stems], device=device)
    for start in range(0, len(branches), batch_size):
        assert cache is not None
        yield _branch_scores(model, cache, lengths, branches[start : start + batch_size])


def _branches(stem: _Stem) -> Iterator[tuple[Sequence[int], int]]:
    """The rests of more than one token: the first is predicted by the stem, the others are not."""
    return ((rest, place) for rest, place in zip(stem.rests, stem.places, strict=True) if len(rest) > 1)


def _branch_scores(
    model: GPT2, cache: KVCache, lengths: Tensor, branches: list[tuple[int, Sequence[int], int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Each rest behind its own copy of its stem, which has the length that `lengths` (B,) says; all tokens but the first."""
    device = lengths.device
    input_ids = _padded([rest[:-1] for _, rest, _ in branches], device)  # (B, T)
    rows = torch.tensor([row for row, _, _ in branches], device=device)
    n_inputs = torch.tensor([len(rest) - 1 for _, rest, _ in branches], device=device)
    in_stem = torch.arange(cache.length, device=device) < lengths[rows, None]
    is_input = torch.arange(input_ids.shape[1], device=device) < n_inputs[:, None]
    copies = cache.branch(rows, cache.length + input_ids.shape[1])
    hidden = model.hidden_states(input_ids, attention_mask=torch.cat([in_stem, is_input], dim=1), kv_cache=copies)
    targets = [(target, place) for _, rest, place in branches for target in rest[1:]]
    return _look_up(model, hidden[is_input], [_Wanted(row, *target) for row, target in enumerate(targets)])


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64, device=device)


def _look_up(model: GPT2, hidden: Tensor, wanted: list[_Wanted]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each wanted token: its log-probability (float64), whether it is not the most probable (int64), its place."""
    rows, targets, places = torch.tensor(wanted).unbind(1)
    _check_ids(targets, model.config.vocab_size)
    log_probs, is_miss = torch.zeros(len(wanted), dtype=torch.float64), torch.zeros(len(wanted), dtype=torch.int64)
    for start in range(0, len(hidden), _ROWS):
        found = at_least_float32(model.logits(hidden[start : start + _ROWS])).log_softmax(-1)  # (R, V)
        is_here = (rows >= start) & (rows < start + _ROWS)
        here, target = (rows[is_here] - start).to(found.device), targets[is_here].to(found.device)
        log_probs[is_here] = found[here, target].cpu().double()
        is_miss[is_here] = (found.argmax(-1)[here] != target).long().cpu()
    return log_probs, is_miss, places


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.numel():
        raise InputError(
            f"token id {wrong[0].item()} is outside the vocabulary of this model: ids go from 0 to {vocab_size - 1}; "
            "use the tokenizer that belongs to it"
        )
