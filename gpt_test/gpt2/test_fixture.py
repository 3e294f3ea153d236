"""Ids, losses and scores equal those that were recorded before the package was rebuilt.

`measured()` wrote `fixtures/before_the_rebuild.json` on 2026-11-29 with the code of commit b7203fb. Ids are compared
exactly, floating-point numbers with a tolerance of 1e-5, because processors add in different orders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gpt2 import GPT2, complete
from gpt2.evaluation import Request, evaluate, log_likelihoods
from gpt_config import GPT2Config
from gpt_encoder import GPT2Tokenizer

FIXTURE = Path(__file__).parent / "fixtures" / "before_the_rebuild.json"

CONFIGS = {
    "odd": GPT2Config(vocab_size=301, n_positions=96, n_embd=60, n_layer=3, n_head=5, activation_function="gelu"),
    "relu": GPT2Config(
        vocab_size=517, n_positions=64, n_embd=64, n_layer=2, n_head=4, activation_function="relu",
        scale_attn_by_inverse_layer_idx=True,
    ),
    "wide": GPT2Config(vocab_size=50257, n_positions=48, n_embd=48, n_layer=2, n_head=3),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 70},
    "sampled": {"max_new_tokens": 70, "do_sample": True, "temperature": 0.8, "top_k": 40, "seed": 5},
    "nucleus": {"max_new_tokens": 30, "do_sample": True, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 6},
    "beams": {"max_new_tokens": 20, "num_beams": 4},
    "speculation": {"max_new_tokens": 70, "speculate": True},
}


def random_model(config: GPT2Config) -> GPT2:
    torch.manual_seed(7)
    model = GPT2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def losses_of_ten_steps(model: GPT2) -> list[float]:
    ids = torch.randint(0, model.config.vocab_size, (4, 17), generator=torch.Generator().manual_seed(2))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def measured(name: str) -> dict[str, Any]:
    """Return ids, losses and scores of gpt2-tiny, or of a model with random weights."""
    model = GPT2.from_pretrained("gpt2-tiny") if name == "gpt2-tiny" else random_model(CONFIGS[name])
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, model.config.vocab_size, (2, 9), generator=generator)
    found: dict[str, Any] = {
        label: model.generate(prompt, **options, stop_at_eot=False)[:, 9:].tolist() for label, options in OPTIONS.items()
    }
    with torch.no_grad():
        logits = model(prompt).double()
    found["logits"] = [logits.sum().item(), logits.abs().sum().item(), logits[1, 8].max().item()]
    scores = log_likelihoods(model, [Request([1, 2, 3], [[4, 5], [4, 6, 7], [8]])])[0]
    found["scores"] = [score.log_prob for score in scores]
    if name == "gpt2-tiny":
        tokenizer = GPT2Tokenizer.from_pretrained("gpt2-tiny")
        text = "The cat sat on the mat. The dog ran to the park and saw a bird, which flew away. " * 20
        found["loss of a text"] = evaluate(model, tokenizer.encode(text), stride=64).loss
        completion = complete(model, tokenizer, "Once upon a time", max_new_tokens=40, stop=("\n\n",))[0]
        found["text"], found["logprobs"] = completion.text, completion.logprobs
    found["losses"] = losses_of_ten_steps(model)
    return found


@pytest.mark.parametrize("name", ["gpt2-tiny", *CONFIGS])
def test_figures_equal_the_recorded_ones(name: str) -> None:
    expected = json.loads(FIXTURE.read_text(encoding="utf-8"))[name]
    found = measured(name)
    assert found.keys() == expected.keys()
    for label, value in expected.items():
        is_exact = label in OPTIONS or label == "text"
        assert found[label] == (value if is_exact else pytest.approx(value, rel=1e-5, abs=1e-5)), label
