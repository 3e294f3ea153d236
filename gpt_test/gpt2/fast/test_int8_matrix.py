"""int8 by oneDNN for many rows: its error against products in float64, the shipped model's loss, and when it is used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import GPT2, KVCache
from gpt2.device import has_matrix_units
from gpt2.fast.int8_matrix import MatrixBlocks, MatrixLinear, MatrixRows, rough_tanh_gelu
from gpt2.fast.limits import FastLimits
from gpt2.fast.plan import DecodePlan
from gpt2.generation.batch import Batch
from gpt2.generation.loop import decode, start
from gpt2.quantization.layers import Int8Linear
from gpt2.quantization.quantize import quantize_int8
from gpt2.weights.folder import locate_model
from gpt_config import GenerationConfig, GPT2Config
from gpt_encoder.tokenizer import load_tokenizer
from gpt_test.conftest import random_model
from gpt_test.gpt2.fast.watching import calls_of

pytestmark = [
    pytest.mark.skipif(not hasattr(torch.ops.onednn, "qlinear_pointwise"), reason="this torch has no such operator"),
    # Older processors add int8 products in 16 bits, which overflow with steps up to 127.
    pytest.mark.skipif(not getattr(torch.cpu, "_is_vnni_supported", lambda: False)(), reason="this processor has no VNNI"),
]


# The operators also run without matrix units, slower.
UNITS = FastLimits(matrix_units=True)


@given(rows=st.integers(1, 40), n_in=st.integers(1, 70), n_out=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_the_error_of_a_product_is_at_most_that_of_its_steps(rows: int, n_in: int, n_out: int, seed: int) -> None:
    """The bound is half a step of each input times its weight. Rows of other scales and rows of zeros change nothing."""
    torch.manual_seed(seed)
    weight = torch.randint(-127, 128, (n_out, n_in), dtype=torch.int8)
    layer = Int8Linear(weight, torch.rand(n_out) + 0.1, torch.randn(n_out))
    x = torch.randn(rows, n_in) * 10 ** torch.randn(rows, 1) * (torch.rand(rows, 1) < 0.9)
    exact = F.linear(x.double(), weight * layer.scale[:, None].double(), layer.bias.double())
    bound = x.abs().amax(1, keepdim=True) / 254 * weight.float().abs().sum(1) * layer.scale
    for dtype, slack in ((torch.float32, 1.001), (torch.bfloat16, 2.1)):
        y = MatrixLinear(layer)(x.to(dtype))
        assert y.dtype == torch.float32
        assert ((y - exact).abs() <= slack * bound + 1e-4).all()


def test_a_change_of_the_weights_is_detected() -> None:
    layer = Int8Linear(torch.randint(-127, 128, (8, 16), dtype=torch.int8), torch.ones(8) / 100, torch.zeros(8))
    x = torch.randn(30, 16)
    before = MatrixLinear(layer)
    assert MatrixLinear(layer)._weight is before._weight
    layer.weight_int8.neg_()
    torch.testing.assert_close(MatrixLinear(layer)(x), -before(x))


def test_the_activation_is_the_tanh_gelu() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, 0.0, 1e10])])[None]
    torch.testing.assert_close(rough_tanh_gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_blocks_are_similar_to_those_of_the_plan(activation: str, is_padded: bool, small_config: GPT2Config) -> None:
    """A prompt in parts, then steps of a batch. The kernel for single rows has errors of the same size."""
    always = replace(UNITS, matrix_rows_at_once=37, matrix_prompt_rows=1, matrix_step_rows=1)
    config = replace(small_config, activation_function=activation)
    model = quantize_int8(random_model(config))
    ids = torch.randint(0, config.vocab_size, (26, 9))
    mask = (torch.arange(9) >= torch.arange(26)[:, None] % 5).long() if is_padded else None
    results = []
    for path in ("rows", "matrix", "only last"):
        limits = FastLimits(matrix_units=False) if path == "rows" else always
        plan = DecodePlan(model, only_last=path == "only last", limits=limits)
        cache, states = KVCache(config, batch_size=26), []
        with torch.inference_mode():
            for past, until in ((0, 7), (7, 8), (8, 9)):
                seen = None if mask is None else mask[:, :until]
                states.append(plan.hidden_states(ids[:, past:until], attention_mask=seen, kv_cache=cache))
        results.append((states, cache.layers))
    (rows, _), (matrix, matrix_cache), (last, last_cache) = results
    assert [state.shape[1] for state in last] == [1, 1, 1]
    seen = slice(None) if mask is None else mask[:, :7].bool()
    torch.testing.assert_close(matrix[0][seen], rows[0][seen], atol=0.2, rtol=0)
    for ours, theirs, short in zip(matrix[1:], rows[1:], last[1:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.2, rtol=0)
        torch.testing.assert_close(short, ours, atol=1e-2, rtol=0)
    torch.testing.assert_close(last[0], matrix[0][:, -1:], atol=1e-2, rtol=0)
    assert torch.equal(last_cache[0][:, :, :, :9], matrix_cache[0][:, :, :, :9])
    assert not torch.equal(matrix[1], rows[1])  # otherwise both would come from the same kernel
    logits, expected = plan.logits(rows[1][:, 0]), model.logits(rows[1][:, 0])
    torch.testing.assert_close(logits, expected, atol=0.02 * expected.abs().amax().item(), rtol=0)


@pytest.mark.skipif(not has_matrix_units(), reason="without matrix units this processor takes ten minutes for it")
def test_the_shipped_model_says_the_same_of_a_prompt() -> None:
    model, quantized = (GPT2.from_pretrained("gpt2-tiny", dtype=dtype) for dtype in ("float32", "int8"))
    text = (locate_model("gpt2-tiny") / "README.md").read_text(encoding="utf-8")
    ids = torch.tensor(load_tokenizer("gpt2-tiny").encode(text))
    ids = ids[: len(ids) // 256 * 256].view(-1, 256)
    plan = DecodePlan(quantized, limits=UNITS)
    with torch.inference_mode():
        assert MatrixRows(UNITS).pay(ids.numel(), is_prompt=True)
        cache = KVCache(model.config, batch_size=len(ids))
        hidden = plan.hidden_states(ids, attention_mask=None, kv_cache=cache)[:, :-1].flatten(0, 1)
        expected = model(ids)[:, :-1].flatten(0, 1)
        loss, expected_loss = (F.cross_entropy(logits, ids[:, 1:].flatten()) for logits in (plan.logits(hidden), expected))
    assert abs(loss - expected_loss) < 0.005  # nats, so the perplexity differs by less than 0.5%


@pytest.mark.parametrize(
    ("n_rows", "is_prompt", "expected"), [(127, True, False), (128, True, True), (23, False, False), (24, False, True)]
)
def test_it_is_used_for_many_rows_only(n_rows: int, is_prompt: bool, expected: bool) -> None:
    assert MatrixRows(UNITS).pay(n_rows, is_prompt=is_prompt) is expected
    assert not MatrixRows(FastLimits(matrix_units=False)).pay(n_rows, is_prompt=is_prompt)


def test_the_decoder_uses_it(small_config: GPT2Config) -> None:
    model, config = quantize_int8(random_model(small_config)), GenerationConfig(max_new_tokens=3)
    rows = start(model, torch.arange(192).view(24, 8).tolist(), config)
    with calls_of(MatrixBlocks.run) as calls:
        for _ in decode(Batch(model, fast=UNITS), rows):
            pass
    assert [call.returned.shape[:2] for call in calls] == [(24, 1)] * 3  # the last token of the prompt, then two steps
