"""All activations and measures against TransformerLens 4.3.0: its golden numbers, and live where it is installed."""

from __future__ import annotations

import functools
import importlib.util
import json

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2.inspection import (
    ablate_each_head,
    activation_names,
    duplicate_token_scores,
    duplicate_tokens,
    induction_scores,
    logit_attribution,
    logit_lens,
    patch_each,
    previous_token_scores,
    previous_tokens,
    tokens_after_duplicates,
    trace,
)
from gpt_test.gpt2.inspection.transformer_lens_oracle import (
    GOLDEN,
    TEXT,
    Arrays,
    Case,
    cases,
    logit_difference,
    patched_sites,
    reduced,
    transformer_lens_arrays,
)

TOLERANCE = 1e-4
NAMES = ("gpt2-tiny", "random")
KINDS = {
    "previous_token": (previous_token_scores, previous_tokens),
    "duplicate_token": (duplicate_token_scores, duplicate_tokens),
    "induction": (induction_scores, tokens_after_duplicates),
}


@functools.cache
def case_of(name: str) -> Case:
    return cases()[name]


@functools.cache
def our_arrays(name: str) -> Arrays:
    """What `transformer_lens_arrays` computes, with this package."""
    case = case_of(name)
    model, found = case.model, trace(case.model, case.clean)
    arrays: dict[str, Tensor] = {"logits": found.logits, **found}
    streams = [one for one in found if one.endswith(("hook_resid_mid", "hook_resid_post"))]
    arrays |= {f"lens: {one}": logit_lens(model, found[one]) for one in streams}
    metric = logit_difference(case)
    for site in patched_sites(case):
        arrays[f"patch: {site}"] = patch_each(model, found, case.corrupt, metric, site).values
    arrays["ablate: heads"] = ablate_each_head(model, case.clean, metric).values
    arrays |= _attributions(case) | (_head_scores(case) if name == "gpt2-tiny" else {})
    return {key: value.detach().numpy() for key, value in arrays.items()}


def _attributions(case: Case) -> dict[str, Tensor]:
    """TransformerLens' stacks: heads and neurons without the biases, and the embeddings only by layer."""
    found = trace(case.model, case.clean)
    by = {name: logit_attribution(case.model, found, case.tokens[0], by=name) for name in ("layer", "head", "neuron")}

    def rows(kind: str, letter: str) -> Tensor:
        names, values = by[kind]
        return values[[place for place, name in enumerate(names) if name.startswith("L") and letter in name]]

    return {
        "attribution: layer": by["layer"].values[:-1],
        "attribution: head": rows("head", "H"),
        "attribution: neuron": rows("neuron", "N"),
        "attribution: bias": by["layer"].values[-1, 0, 0],
    }


def _head_scores(case: Case) -> dict[str, Tensor]:
    """TransformerLens divides by all tokens, this package by those that have a target."""
    from gpt_encoder import load_tokenizer

    ids = torch.tensor([[4095, *load_tokenizer("gpt2-tiny").encode(TEXT)]])
    found = trace(case.model, ids, "hook_pattern")
    scores = {}
    for kind, (score, targets) in KINDS.items():
        scores[f"heads: {kind}"] = score(found) * targets(found).any(-1).sum() / ids.shape[1]
    return {**scores, "heads: ids": ids.float()}


def test_every_name_is_in_the_golden_file() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert GOLDEN.stat().st_size < 300_000 and golden["versions"]["transformer-lens"] == "4.3.0"
    for name in NAMES:
        assert set(golden[name]) == set(our_arrays(name))
        assert set(activation_names(len(case_of(name).model.h))) < set(golden[name])


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_transformer_lens(name: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    for key, ours in our_arrays(name).items():
        found = reduced(ours)
        assert found["shape"] == golden[key]["shape"], key
        for numbers in ("values", "means"):
            np.testing.assert_allclose(found[numbers], golden[key][numbers], rtol=TOLERANCE, atol=TOLERANCE, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_numbers_are_those_of_the_installed_transformer_lens(name: str) -> None:
    if not importlib.util.find_spec("transformer_lens"):
        pytest.skip("transformer_lens is not installed (pip install transformer-lens==4.3.0); the golden file is compared")
    theirs = transformer_lens_arrays(case_of(name))
    for key, ours in our_arrays(name).items():
        np.testing.assert_allclose(ours, theirs[key], rtol=TOLERANCE, atol=TOLERANCE, err_msg=key)
