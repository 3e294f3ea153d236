"""DPO: loss and gradients equal the formula in float64, and only the last response of each conversation counts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from gpt2 import GPT2
from gpt2.finetuning.instructions import Turn
from gpt2.finetuning.preference import (
    DPOLoss,
    Pair,
    PreferenceTuning,
    encode_pairs,
    preference,
    reference_log_probs,
    response_log_probs,
)
from gpt2.finetuning.records import BadRecord
from gpt2.finetuning.template import InstructionTemplate
from gpt_config import TrainingConfig
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model

PLAIN = InstructionTemplate.load("plain")
PAIRS = [
    Pair([Turn("go home", "yes, now")], [Turn("go home", "no")]),
    Pair([Turn("the sea", "boats")], [Turn("the sea", "a cat and a fish")]),
    Pair([Turn("a", "b"), Turn("c", "the cat")], [Turn("a", "b"), Turn("c", "the dog")]),
]


def by_hand(model: GPT2, side, beta: float = 1.0) -> torch.Tensor:
    """The log-probability of the last response, token by token, without batches or padding."""
    log_probs = model(torch.tensor([side.ids]))[0].log_softmax(-1)
    places = [place for place in range(1, len(side.ids)) if side.is_learned[place]]
    return sum((log_probs[place - 1, side.ids[place]] for place in places), torch.zeros((), dtype=log_probs.dtype))


def test_loss_and_gradients_equal_the_formula(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    reference = random_model(small_model.config, 1, torch.float64)
    reference.set_dropout(0.0)
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, dtype=torch.float64)
    pairs, n_dropped = encode_pairs(PAIRS, small_tokenizer, PLAIN, 40)
    assert n_dropped == 0 and len(pairs) == 3
    measured = reference_log_probs(reference, pairs, 2)
    margins = []
    for pair, row in zip(pairs, measured, strict=True):
        sides = [by_hand(reference, side).detach() for side in (pair.chosen, pair.rejected)]
        assert row.tolist() == pytest.approx([side.item() for side in sides], abs=1e-9)
        ratios = [by_hand(model, side) - base for side, base in zip((pair.chosen, pair.rejected), sides, strict=True)]
        margins.append(0.3 * (ratios[0] - ratios[1]))
    expected = sum(torch.log(1 + torch.exp(-margin)) for margin in margins) / 3
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    config = TrainingConfig(batch_size=3, max_steps=1)
    objective = PreferenceTuning(model, pairs, pairs, (measured, measured), config, 0.3)
    ids, targets, kept, _ = objective.batches(0)
    order = [int(np.abs(measured.astype(np.float32) - row).sum(1).argmin()) for row in kept]
    exact = torch.from_numpy(measured[order])
    module = DPOLoss(model, 0.3)
    loss = module(torch.from_numpy(ids), torch.from_numpy(targets), exact, torch.ones(3, dtype=torch.float64))
    loss.backward()
    assert sorted(order) == [0, 1, 2] and loss.item() == pytest.approx(expected.item(), abs=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-9, msg=name)
    module.eval()(torch.from_numpy(ids), torch.from_numpy(targets), exact, torch.ones(3, dtype=torch.float64))
    figures = module.figures()
    assert figures["accuracy"] == sum(margin.item() > 0 for margin in margins) / 3
    assert figures["margin"] == pytest.approx(sum(margin.item() for margin in margins) / 3, abs=1e-9)
    assert module.figures() == {"accuracy": 0.0, "margin": 0.0}


def test_only_the_last_response_counts(small_tokenizer: GPT2Tokenizer) -> None:
    [*_, last], _ = encode_pairs(PAIRS, small_tokenizer, PLAIN, 40)
    answer = [*small_tokenizer.encode("the dog"), small_tokenizer.eot_token_id]
    learned = [token for token, counts in zip(last.rejected.ids, last.rejected.is_learned, strict=True) if counts]
    assert learned == answer and last.rejected.ids[-len(answer) :] == answer
    assert encode_pairs(PAIRS, small_tokenizer, PLAIN, 12)[1] > 0


def test_many_tokens_are_computed_in_parts(small_model: GPT2) -> None:
    ids = torch.randint(300, (60, 40), generator=torch.Generator().manual_seed(0))
    found = response_log_probs(small_model, ids[:, :-1], ids[:, 1:])
    log_probs = small_model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(found, log_probs, rtol=1e-5, atol=1e-4)


def test_pairs_are_texts_or_messages() -> None:
    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    expected = Pair([Turn("hello", "yes")], [Turn("hello", "no")])
    user, yes, no = message("user", "hello"), message("assistant", "yes"), message("assistant", "no")
    assert preference({"prompt": "hello", "chosen": "yes", "rejected": "no"}) == expected
    assert preference({"prompt": [user], "chosen": [yes], "rejected": [no]}) == expected
    assert preference({"chosen": [user, yes], "rejected": [user, no]}) == expected
    for fields, words in (
        ({"prompt": "hello", "chosen": "yes"}, "rejected"),
        ({"prompt": "hello", "chosen": [yes], "rejected": [no]}, "use one form"),
        ({"chosen": [user, yes], "rejected": [message("user", "bye"), no]}, "do not answer the same prompt"),
        ({"prompt": "hello", "chosen": "yes", "rejected": "yes"}, "are equal"),
    ):
        with pytest.raises(BadRecord, match=words):
            preference(fields)
