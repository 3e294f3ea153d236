"""Packed weights of 16 bits give the plain product, also after weights change, and with a missing kernel."""

from __future__ import annotations

import pytest
import torch

from gpt2 import GPT2, KVCache
from gpt2.device import has_matrix_units
from gpt2.fast.limits import FastLimits
from gpt2.fast.linear import (
    PLAIN_FOR_ROWS,
    activated,
    activated_product,
    can_pack_for_rows,
    fast_head,
    fast_linear,
    has_same_rows,
    of_each,
    one_by_one,
    packed_for_rows,
    product,
    product_of_each,
)
from gpt2.fast.plan import DecodePlan
from gpt2.model import Conv1D, TokenEmbedding
from gpt2.quantization.derived import state_with_contents
from gpt2.quantization.kernels import ROWS_OF_PART
from gpt_config import GPT2Config
from gpt_test.conftest import random_model

DTYPES = (torch.bfloat16, torch.float16)


def bfloat16_layer(n_in: int = 24, n_out: int = 40) -> Conv1D:
    layer = Conv1D(n_in, n_out)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    return layer.to(torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 2, 7, 255, 256, 257])
@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("by_float16", [False, True])
def test_the_product_is_that_of_the_layer(rows: int, has_amx: bool, by_float16: bool) -> None:
    layer, x = bfloat16_layer(), torch.randn(rows, 24).bfloat16()
    exact = x.double() @ layer.weight.double() + layer.bias.double()
    linear = fast_linear(layer, FastLimits(matrix_units=has_amx, bfloat16_by_float16=by_float16))
    y = product(x, linear)
    if linear.kind in PLAIN_FOR_ROWS and can_pack_for_rows(layer.weight):
        assert torch.equal(product(x, packed_for_rows(layer, linear)), y)
    assert y.dtype == torch.bfloat16
    assert ((y - exact).abs() <= exact.abs() * 2**-8 + 0.02).all()


@pytest.mark.parametrize("rows", [1, 63, 64, 255, 256])
@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("by_float16", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "none", "relu"])
def test_many_rows_in_bfloat16_are_activated_with_one_rounding(
    rows: int, has_amx: bool, by_float16: bool, activation: str
) -> None:
    layer, x = bfloat16_layer(), torch.randn(rows, 24).bfloat16()
    linear = fast_linear(layer, FastLimits(matrix_units=has_amx, bfloat16_by_float16=by_float16))
    exact = activated(x.double() @ layer.weight.detach().double() + layer.bias.detach().double(), activation)
    y, in_two_steps = activated_product(x, linear, activation), activated(product(x, linear), activation)
    assert y.dtype == torch.bfloat16 and ((y - exact).abs() <= exact.abs() * 2**-7 + 0.01).all()
    if linear.kind in ("bfloat16", "bfloat16 by float16") and 64 <= rows < linear.many_rows and activation != "relu":
        assert ((y - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
        assert (y - exact).abs().mean() < 0.95 * (in_two_steps - exact).abs().mean()
    else:
        assert torch.equal(y, in_two_steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_in", [24, 30, 64, 192, 5120])
@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_each_row_has_the_bits_of_its_own_product(dtype: torch.dtype, n_in: int, has_amx: bool, n_threads: int) -> None:
    """Matrix units multiply rows together if `has_same_rows` allows it; all other kernels multiply one row at a time.

    The exact sums are 0, so the results contain only rounding errors, which depend on the order of additions.
    """
    limits = FastLimits(matrix_units=has_amx and has_matrix_units(), bfloat16_by_float16=not has_amx)
    half, pairs = torch.randn(17, n_in // 2), torch.randperm(n_in // 2)
    x = torch.cat([half, half[:, pairs]], 1).to(dtype)
    n_threads_before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        for layer in (bfloat16_layer(n_in, 1280).to(dtype), TokenEmbedding(101, n_in).to(dtype)):
            with torch.no_grad():
                inputs = layer.weight if isinstance(layer, Conv1D) else layer.weight.t()
                inputs[n_in // 2 :] = -inputs[: n_in // 2][pairs]
            linear = fast_linear(layer, limits) if isinstance(layer, Conv1D) else fast_head(layer, limits)
            linear = of_each(linear)
            if linear.kind in ("bfloat16", "float16") and not has_same_rows(layer, linear):
                linear = one_by_one(linear)
            alone = torch.cat([product(row, linear) for row in x.split(1)])
            for rows in (2, 3, 5, 9, 17):
                assert torch.equal(product_of_each(x[:rows], linear), alone[:rows])
    finally:
        torch.set_num_threads(n_threads_before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_have_the_bits_of_their_own_products_too(dtype: torch.dtype) -> None:
    """Also where a product of so many rows without this demand uses another kernel."""
    limits = FastLimits(matrix_units=False, bfloat16_by_float16=True, rows_for_float32=128)
    linear = of_each(fast_linear(bfloat16_layer(768, 1280).to(dtype), limits))
    if linear.kind != "float16":
        pytest.skip("torch has no such kernel for this processor")
    x = torch.randn(130, 768).to(dtype)
    assert torch.equal(product_of_each(x, linear), torch.cat([product(row, linear) for row in x.split(1)]))


@pytest.mark.parametrize("n_embd", [64, 36])
def test_if_bits_depend_on_other_rows_they_are_multiplied_one_by_one(n_embd: int) -> None:
    """For example, with a width that is not a multiple of 64, sums may depend on the number of rows."""
    config = GPT2Config(vocab_size=50, n_positions=20, n_embd=n_embd, n_layer=2, n_head=2)
    model = random_model(config, dtype=torch.bfloat16)
    linear = fast_head(model.wte)
    if linear.kind != "bfloat16":
        pytest.skip("this processor has no matrix units")
    assert has_same_rows(model.wte, linear) or n_embd == 36
    assert not (has_same_rows(model.wte, linear) and n_embd == 36)
    plan, ids, states = DecodePlan(model), torch.arange(12)[None], []
    of_each = plan.for_drafts
    assert of_each is not None and of_each is not plan
    with torch.inference_mode():
        for ends in (range(1, 13), (1, 12)):
            cache, done = KVCache(model.config, dtype=torch.bfloat16), 0
            for end in ends:
                hidden = of_each.hidden_states(ids[:, done:end], attention_mask=None, kv_cache=cache)
                done = end
            states.append(of_each.logits(hidden[0])[-1])
    assert torch.equal(*states)


def test_a_processor_that_cannot_pack_bfloat16_uses_the_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors without AVX-512 have the operators too, but the operators raise."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    linear = fast_linear(bfloat16_layer(), FastLimits(pack_float16=False))
    assert linear.kind == "float" and product(torch.ones(1, 24).bfloat16(), linear).shape == (1, 40)


def test_short_texts_pack_no_float16_where_bfloat16_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on what is asked for, and not on what is packed already."""
    layer, limits = bfloat16_layer(), FastLimits(bfloat16_by_float16=True)
    if fast_linear(layer, limits).kind != "bfloat16 by float16":
        pytest.skip("this processor multiplies bfloat16 with one kernel")
    kinds = [fast_linear(layer, limits.for_tokens(n)).kind for n in (63, 64, 1, 200)]
    assert kinds == ["bfloat16", "bfloat16 by float16"] * 2
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert fast_linear(layer, limits.for_tokens(1)).kind == "float16"


@pytest.mark.parametrize("rows", [1, 9])
def test_bfloat16_beyond_float16_is_multiplied_by_another_kernel(rows: int) -> None:
    """Small weights are within 3e-8 of themselves in float16, which is less than the rounding of the others."""
    limits = FastLimits(bfloat16_by_float16=True)
    layer, x = bfloat16_layer(), torch.randn(rows, 24).bfloat16()
    with torch.no_grad():
        layer.weight[0] *= 2**-30
    exact = x.double() @ layer.weight.double() + layer.bias.double()
    assert ((product(x, fast_linear(layer, limits)) - exact).abs() <= exact.abs() * 2**-8 + 0.02).all()
    with torch.no_grad():
        layer.weight[0, 0] = 1e5
    linear = fast_linear(layer, limits)
    exact = x.double() @ layer.weight.double() + layer.bias.double()
    assert (
        "float16" not in linear.kind.replace("bfloat16", "")
        and (product(x, linear).double() / exact - 1).abs().max() < 2**-7
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="several rows need oneDNN")
@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("n_in, n_out", [(8, 3), (64, 7), (768, 50)])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_float32_without_mkl_is_as_exact(rows: int, n_in: int, n_out: int, n_threads: int) -> None:
    """Also where the vocabulary is no multiple of the number of parts."""
    limits = FastLimits(avoid_mkl=True, min_bytes_without_mkl=0)
    layer, head, x = Conv1D(n_in, n_out), TokenEmbedding(n_out + 8, n_in), torch.randn(rows, n_in)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    n_threads_before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with torch.inference_mode():
            for linear, exact, plain in (
                (fast_linear(layer, limits), x.double() @ layer.weight.double() + layer.bias, layer(x)),
                (fast_head(head, limits), x.double() @ head.weight.double().t(), head.logits(x)),
            ):
                assert linear.kind.endswith("without MKL")
                bound = n_in * 2**-24 * (1 + exact.abs().max())
                assert (product(x, linear) - exact).abs().max() <= bound and (plain - exact).abs().max() <= bound
    finally:
        torch.set_num_threads(n_threads_before)


@pytest.mark.parametrize("n_in", [1, 7, 24, 64, 3072])
@pytest.mark.parametrize("rows", [1, 2, 9, 128])
def test_packed_float16_is_the_product_rounded_once(n_in: int, rows: int) -> None:
    """Sums are in float32. Weights below the normal numbers are kept, and a layer with infinite ones is not packed."""
    layer, x = bfloat16_layer(n_in, 2 * ROWS_OF_PART + 1 if n_in == 24 else 70).half(), torch.randn(rows, n_in).half()
    with torch.no_grad():
        layer.weight[0, :8] *= 2**-20
    linear = fast_linear(layer)
    if linear.kind == "float":
        pytest.skip("this processor has no such kernel")
    assert len(linear.packed) == (3 if n_in == 24 else 1)
    exact = x.double() @ layer.weight.double() + layer.bias.double()
    of_sums = n_in * 2**-24 * (x.double().abs() @ layer.weight.double().abs() + layer.bias.abs())
    assert ((product(x, linear) - exact).abs() <= exact.abs() * 2**-11 + 2 * of_sums + 2**-24).all()
    with torch.no_grad():
        layer.weight[0, 0] = float("inf")
    linear = fast_linear(layer)
    assert linear.kind == "float" and not torch.isfinite(product(torch.ones(1, n_in).half(), linear)[0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_are_kept_until_they_change(dtype: torch.dtype) -> None:
    layer, x = bfloat16_layer(23, 41).to(dtype), torch.randn(1, 23).to(dtype)
    if fast_linear(layer).kind == "float":
        pytest.skip("torch has no such kernel for this processor")

    def packed() -> object:
        linear = fast_linear(layer)
        return linear.weight if linear.packed is None else linear.packed[0]

    before = packed()
    assert packed() is before
    with torch.no_grad():
        layer.weight.mul_(2)
    layer.bias.data.zero_()
    assert packed() is not before
    torch.testing.assert_close(product(x, fast_linear(layer)), layer(x), atol=0.1, rtol=0.02)
    layer.weight.data[3, 5] += 1  # this does not change the tensor's version
    torch.testing.assert_close(product(x, fast_linear(layer)), layer(x), atol=0.1, rtol=0.02)
    layer.bias = torch.nn.Parameter(layer.bias + 7)
    torch.testing.assert_close(product(x, fast_linear(layer)), layer(x), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("shape", [(7, 5), (6, 8), (1, 3), (9, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_state_of_weights_shows_every_change(shape: tuple[int, int], dtype: torch.dtype, offset: int) -> None:
    # The same numbers in each run: the sums of two rows of random bytes are equal once in a few hundred runs.
    numbers = torch.randn(shape[0] * shape[1] + offset, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    values = numbers.to(dtype)[offset:]
    rows = values.view(shape)
    for weight in (rows, rows.t()):
        before = state_with_contents(weight)
        assert state_with_contents(weight) == before
        for value in values.data:
            value.neg_()
            assert state_with_contents(weight) != before
            value.neg_()
    if len(rows) > 1:
        rows.data[[0, 1]] = rows.data[[1, 0]].clone()
        assert state_with_contents(rows) != before


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_kernel_the_logits_are_those_of_the_model(small_config: GPT2Config, dtype: torch.dtype) -> None:
    model = random_model(small_config).to(dtype)
    ids, cache = torch.randint(0, 300, (2, 9)), KVCache(small_config, batch_size=2, dtype=dtype)
    plan = DecodePlan(model, limits=FastLimits(pack_bfloat16=False, pack_float16=False))
    with torch.inference_mode():
        assert torch.equal(plan.logits(plan.hidden_states(ids, attention_mask=None, kv_cache=cache)), model(ids))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_in_16_bits_are_about_as_exact_as_those_of_the_model(small_config: GPT2Config, dtype: torch.dtype) -> None:
    model, exact = random_model(small_config, dtype=dtype), random_model(small_config, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    ids, cache = torch.randint(0, 300, (2, 30)), KVCache(small_config, batch_size=2, dtype=dtype)
    plan = DecodePlan(model)
    with torch.inference_mode():
        errors = [
            (logits - exact(ids)).abs().mean()
            for logits in (model(ids), plan.logits(plan.hidden_states(ids, attention_mask=None, kv_cache=cache)))
        ]
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_changes_of_a_model_between_generations_are_detected(small_config: GPT2Config, dtype: torch.dtype) -> None:
    model = random_model(small_config).to(dtype)
    prompt = torch.tensor([[1, 2, 3]])
    first = model.generate(prompt, max_new_tokens=9, stop_at_eot=False)
    for block in model.h:
        block.mlp.c_proj.weight.data.zero_()
    changed = model.generate(prompt, max_new_tokens=9, stop_at_eot=False)
    twin = GPT2(small_config).to(dtype).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(changed, twin.generate(prompt, max_new_tokens=9, stop_at_eot=False))
    assert not torch.equal(first, changed)
