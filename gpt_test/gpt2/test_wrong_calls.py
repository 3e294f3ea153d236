"""Calls that cannot work are one clear error: masks, ids of another type, weights of several dtypes, int8 in 16 bits."""

from __future__ import annotations

import pytest
import torch

from gpt2 import GPT2, KVCache, complete
from gpt_config import GPT2Error, InputError, InputTypeError
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model

IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize("mask", [
    torch.tensor([[1, 2, 1]]), torch.tensor([[0, -1, 1]]), torch.tensor([[0.0, -10000.0, 0.0]]), torch.tensor([[1, 0.5, 1]]),
    torch.tensor([[1.0, float("nan"), 1.0]]), torch.tensor([[255, 1, 1]], dtype=torch.uint8),
])  # fmt: skip
def test_a_mask_with_other_values_than_0_and_1_is_refused(mask: torch.Tensor, small_model: GPT2) -> None:
    for call in (small_model, small_model.generate):
        with pytest.raises(InputError, match=r"attention_mask contains .*: use 1 or True for tokens") as caught:
            call(IDS, attention_mask=mask)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_a_mask_of_0_and_1_may_have_any_dtype(dtype: torch.dtype, small_model: GPT2) -> None:
    mask = torch.tensor([[0, 1, 1]])
    assert torch.equal(small_model(IDS, attention_mask=mask.to(dtype)), small_model(IDS, attention_mask=mask))


@pytest.mark.parametrize("mask", [[[1, 1, 1]], "111", 1])
def test_a_mask_that_is_no_tensor_is_refused(mask: object, small_model: GPT2) -> None:
    for call in (small_model, small_model.generate):
        with pytest.raises(InputTypeError, match="attention_mask must be a tensor"):
            call(IDS, attention_mask=mask)


@pytest.mark.parametrize("ids", [None, [[1, 2]], "text"])
def test_ids_that_are_no_tensor_are_refused(ids: object, small_model: GPT2) -> None:
    for call in (small_model, small_model.generate):
        with pytest.raises(InputTypeError, match="input_ids must be a tensor"):
            call(ids)


@pytest.mark.parametrize("part", ["h.0", "h.1.mlp.c_fc", "ln_f", "wte"])
def test_weights_of_several_dtypes_are_one_error(part: str, small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    model = random_model(small_model.config)
    model.get_submodule(part).half()
    cache = KVCache(model.config)
    for call in (
        lambda: model(IDS),
        lambda: model(IDS, kv_cache=cache),
        lambda: model.generate(IDS, max_new_tokens=3),
        lambda: model.generate(IDS, max_new_tokens=3, use_cache=False),
        lambda: complete(model, small_tokenizer, ["a", "the owl"], max_new_tokens=3),
    ):
        with pytest.raises(InputError, match=r"mixes dtypes .*float16.*: convert all with model\.to") as caught:
            call()
        assert str(caught.value).isprintable()
    assert cache.length == 0
    model.float()
    assert model(IDS).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_int8_model_in_another_dtype_is_one_error(dtype: torch.dtype) -> None:
    model = GPT2.from_pretrained("gpt2-tiny", dtype="int8")
    expected = model(IDS)
    with pytest.raises(GPT2Error, match="an int8 model computes in float32, not in"):
        model.to(dtype)
    assert torch.equal(model(IDS), expected)
