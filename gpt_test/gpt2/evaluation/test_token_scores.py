"""Log-probability, surprisal and rank of each token equal those from transformers, for a text of any length."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from gpt2 import GPT2
from gpt2.evaluation.token_scores import TokenScore, score_tokens, totals, whole_characters
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import TRAINING_TEXT, transformers_twin


@pytest.mark.parametrize("stride", [None, 7])
def test_scores_equal_those_of_transformers(small_model: GPT2, small_tokenizer: GPT2Tokenizer, stride: int | None) -> None:
    text = f"{TRAINING_TEXT} é🦙"
    ids = [small_tokenizer.eot_token_id, *small_tokenizer.encode(text)]
    scores = score_tokens(small_model, small_tokenizer, text, stride=stride, batch_size=3)
    twin, end = transformers_twin(small_model), 0
    while end < len(ids) - 1:
        first, end = end, min(len(ids) - 1, 40 if end == 0 else end + (stride or 40))
        with torch.no_grad():
            log_probs = twin(torch.tensor([ids[max(0, end - 40) : end]])).logits[0].double().log_softmax(-1)
        for place in range(first, end):
            row = log_probs[place - end]
            assert scores[place].log_prob == pytest.approx(row[ids[place + 1]].item(), abs=1e-4)
            assert scores[place].rank == 1 + sorted(row.tolist(), reverse=True).index(row[ids[place + 1]].item())
    assert [score.id for score in scores] == ids[1:]
    assert b"".join(score.piece for score in scores) == text.encode()
    assert all(text.encode()[score.start :].startswith(score.piece) for score in scores)
    sums = totals(scores)
    assert sums.bits == pytest.approx(sum(score.bits for score in scores)) and sums.n_bytes == len(text.encode())
    assert sums.perplexity == pytest.approx(math.exp(-sums.log_prob / len(scores)))
    assert sums.bits_per_byte == pytest.approx(sums.bits / sums.n_bytes)


def test_equal_logits_have_the_same_rank(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    model = copy.deepcopy(small_model)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.zero_()
    assert {score.rank for score in score_tokens(model, small_tokenizer, "the cat")} == {1}


def test_without_an_end_of_text_token_the_first_is_not_scored(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    tokenizer = copy.copy(small_tokenizer)
    tokenizer.special_tokens = {}
    scores = score_tokens(small_model, tokenizer, "The cat")
    assert scores[0].log_prob is None and scores[0].bits is None and all(s.log_prob is not None for s in scores[1:])
    sums = totals(scores)
    assert sums.n_scored == sums.n_tokens - 1 and sums.n_bytes == 7 - len(scores[0].piece)
    assert totals(score_tokens(small_model, tokenizer, "T")).perplexity is None
    assert score_tokens(small_model, tokenizer, "") == [] == score_tokens(small_model, small_tokenizer, "")


def test_parts_of_a_character_are_joined() -> None:
    pieces = [b"a", "🦙".encode()[:2], "🦙".encode()[2:] + b"b", b"\xff", "é".encode()[:1]]
    scores = [TokenScore(n, piece, 0, -math.log(2) * (n + 1), 1) for n, piece in enumerate(pieces)]
    assert [text for text, _ in whole_characters(scores)] == ["a", "🦙b", "\ufffd", "\ufffd"]
    assert [bits for _, bits in whole_characters(scores)] == pytest.approx([1, 2 + 3, 4, 5])
