"""Log-probability, surprisal and rank of each token of a text. It needs a model and a tokenizer, and prints nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch

from gpt2.dropout import in_mode
from gpt2.evaluation.figures import bounded_exp, check_not_nan
from gpt2.evaluation.windows import predictions
from gpt2.model import GPT2
from gpt2.weights.tokenizer import check_ids
from gpt_encoder.interface import Tokenizer


@dataclass(frozen=True)
class TokenScore:
    """One token and how the model scores it. `log_prob` and `rank` are None if no token precedes it."""

    id: int
    piece: bytes
    start: int  # offset in the text's UTF-8 bytes
    log_prob: float | None  # natural logarithm
    rank: int | None  # 1 is the most probable token

    @property
    def bits(self) -> float | None:
        """Surprisal: the number of bits that encode the token with the model's probabilities."""
        return None if self.log_prob is None else -self.log_prob / math.log(2)


@dataclass(frozen=True)
class Totals:
    """Sums over a text. All except `n_tokens` count only scored tokens: all tokens, or all except the first."""

    n_tokens: int
    n_scored: int
    n_bytes: int
    log_prob: float  # natural logarithm
    n_rank_1: int  # tokens that were the most probable ones

    @property
    def bits(self) -> float:
        """Surprisal of the text in bits."""
        return -self.log_prob / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        """Surprisal per byte of the scored tokens, in bits; None if they have no bytes."""
        return self.bits / self.n_bytes if self.n_bytes else None

    @property
    def perplexity(self) -> float | None:
        """Per token; None if no token was scored."""
        return bounded_exp(-self.log_prob / self.n_scored) if self.n_scored else None


def score_tokens(
    model: GPT2,
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> list[TokenScore]:
    """A TokenScore for each token of `text`. A text of any length is scored in windows, as in `evaluate`.

    The first token is predicted from `<|endoftext|>`. If the vocabulary has none, the first token is not scored. Dropout is
    off in either mode of the model. ConfigError if a size is invalid; CheckpointError if the model computes NaN.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    check_ids(ids, tokenizer, model.config.vocab_size)
    first = [] if tokenizer.eot_token_id is None else [tokenizer.eot_token_id]
    with in_mode(model, is_training=False):
        predicted = list(_predicted(model, [*first, *ids], context, stride, batch_size))
    check_not_nan(math.fsum(log_prob for log_prob, _ in predicted))
    found = chain([(None, None)] * (1 - len(first)), predicted)
    scores, start = [], 0
    for token_id, (log_prob, rank) in zip(ids, found, strict=False):
        piece = tokenizer.decode_bytes([token_id])
        scores.append(TokenScore(token_id, piece, start, log_prob, rank))
        start += len(piece)
    return scores


@torch.inference_mode()
def _predicted(
    model: GPT2, ids: list[int], context: int | None, stride: int | None, batch_size: int
) -> Iterator[tuple[float, int]]:
    for logits, targets in predictions(model, ids, context=context, stride=stride, batch_size=batch_size):
        chosen = logits.gather(1, targets[:, None])  # (R, 1)
        log_probs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        ranks = 1 + (logits > chosen).sum(-1)
        yield from zip(log_probs.tolist(), ranks.tolist(), strict=True)


def totals(scores: list[TokenScore]) -> Totals:
    """The sums over `scores`."""
    scored = [score for score in scores if score.log_prob is not None]
    return Totals(
        n_tokens=len(scores),
        n_scored=len(scored),
        n_bytes=sum(len(score.piece) for score in scored),
        log_prob=math.fsum(score.log_prob or 0.0 for score in scored),
        n_rank_1=sum(score.rank == 1 for score in scored),
    )


def whole_characters(scores: list[TokenScore]) -> Iterator[tuple[str, float | None]]:
    """(text, bits) for the tokens in order. Tokens that are parts of one character are joined, and their bits are added.

    `bits` is None if one of them was not scored. Bytes that are not UTF-8 become U+FFFD.
    """
    held, bits = b"", 0.0
    is_scored = True
    for number, score in enumerate(scores):
        held += score.piece
        is_scored = is_scored and score.bits is not None
        bits += score.bits or 0.0
        if number + 1 == len(scores) or not _is_cut(held):
            yield held.decode("utf-8", errors="replace"), bits if is_scored else None
            held, bits, is_scored = b"", 0.0, True


def _is_cut(piece: bytes) -> bool:
    """Whether `piece` ends inside a character that later bytes may complete."""
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.end == len(piece) and error.reason == "unexpected end of data"
    return False
