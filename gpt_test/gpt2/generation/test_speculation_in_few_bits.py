"""Speculative decoding in int8 and 16 bits, where rounding could change ids: they are the same, or nothing is drafted."""

from __future__ import annotations

import pytest
import torch

from gpt2 import GPT2
from gpt2.fast.plan import DecodePlan
from gpt2.generation.decoder import Decoder
from gpt2.generation.window import Window
from gpt2.quantization.kernels import ENGINES
from gpt2.quantization.layers import rounds_each_alone
from gpt2.quantization.quantize import quantize_int8
from gpt_encoder.tokenizer import load_tokenizer
from gpt_test.conftest import repetitive_model
from gpt_test.gpt2.generation.test_speculation import CONFIG, eager, new_rows


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float16"])
@pytest.mark.parametrize("prompt", ["a . dog . . a . dog . . a . dog", "no, no, no, no", "Tom and Sue. Tom and Sue. Tom"])
def test_in_few_bits_drafts_change_no_ids(prompt: str, dtype: str) -> None:
    """If rows were rounded together, 3 of 4 texts of the shipped model would change in int8, and 1 of 4 in bfloat16."""
    model = GPT2.from_pretrained("gpt2-tiny", dtype=dtype)
    if DecodePlan(model).for_drafts is None:
        pytest.skip("on this processor torch rounds several rows differently from one, so nothing is drafted")
    ids = [load_tokenizer("gpt2-tiny").encode(prompt)]
    with eager() as verified:
        rows, expected = (new_rows(model, ids, max_new_tokens=120, speculate=is_on) for is_on in (True, False))
    assert rows == expected  # ids, finish reasons and log-probabilities
    assert any(n_taken > 0 for _, n_taken in verified) and any(n_taken < n_drafts for n_drafts, n_taken in verified)


@pytest.mark.parametrize("engine", ["x86", "onednn", "hook"])
def test_in_int8_drafts_are_made_only_if_they_change_no_tokens(engine: str, small_model: GPT2) -> None:
    """No drafts are made outside the plan, or with kernels that cannot round the rows of the head one by one."""
    model = quantize_int8(repetitive_model(small_model.config), engines=("onednn",) if engine == "onednn" else ENGINES)
    takes_drafts = engine == "x86" and rounds_each_alone()
    if engine == "hook":
        model.h[0].register_forward_hook(lambda *_: None)
    assert (Decoder(model, [Window([1, 2, 3], 40)], 20).verifier is not None) is takes_drafts
    with eager() as verified:
        model.generate(torch.tensor([[1, 2, 1, 2, 1, 2]]), max_new_tokens=30, speculate=True)
    assert takes_drafts or not verified


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_in_16_bits_nothing_is_drafted_outside_the_plan(dtype: torch.dtype) -> None:
    model = repetitive_model(CONFIG, dtype=dtype)
    model.h[0].register_forward_hook(lambda *_: None)
    assert (Decoder(model, [Window([1, 2, 3], 20)], 9).verifier is not None) is (dtype == torch.float32)
