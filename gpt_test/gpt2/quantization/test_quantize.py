"""int8 layers follow their definition and are close to float32; the int8 kernel gives the plain product."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2 import GPT2, KVCache
from gpt2.adapters.lora import add_lora
from gpt2.evaluation import evaluate
from gpt2.fast.linear import fast_norm_and_linear, product
from gpt2.fast.plan import DecodePlan
from gpt2.quantization import kernels, layers, rounding
from gpt2.quantization.kernels import ENGINES, int8_product, int8_product_of_each, packing_engine
from gpt2.quantization.layers import Int8Linear, pack_together, rounds_each_alone
from gpt2.quantization.quantize import is_int8, quantize_int8
from gpt2.training import Trainer, prepare
from gpt2.weights.folder import locate_model
from gpt_config import GPT2Config, TrainingConfig
from gpt_config.errors import CheckpointError, DeviceError, GPT2Error, InputError
from gpt_config.lora_config import LoRAConfig
from gpt_encoder.tokenizer import load_tokenizer
from gpt_test.conftest import TRAINING_TEXT, random_model, skip_unless_rows_are_rounded_alone


def int8_copy(model: GPT2, *, engines: Sequence[str] = ENGINES) -> GPT2:
    copy = GPT2(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return quantize_int8(copy, engines=engines)


def test_weights_of_each_output_are_rounded_to_127_steps(small_model: GPT2) -> None:
    layer, plain = int8_copy(small_model).h[1].mlp.c_fc, small_model.h[1].mlp.c_fc
    restored = (layer.weight_int8 * layer.scale[:, None]).t()
    largest = plain.weight.abs().amax(0)
    torch.testing.assert_close(layer.scale, largest / 127)
    assert ((restored - plain.weight).abs() <= largest / 254 * 1.001).all()
    assert layer.weight_int8.abs().amax(1).eq(127).all()


@given(rows=st.integers(1, 9), n_in=st.integers(1, 70), n_out=st.integers(1, 70), seed=st.integers(0, 99))
def test_the_kernel_gives_the_plain_product(rows: int, n_in: int, n_out: int, seed: int) -> None:
    """The error is at most that of rounding the inputs to steps: half a step of each input times its weight."""
    torch.manual_seed(seed)
    weight = torch.randint(-127, 128, (n_out, n_in), dtype=torch.int8)
    layer = Int8Linear(weight, torch.rand(n_out) + 0.1, torch.randn(n_out))
    x = torch.randn(rows, n_in) * 10 ** torch.randn(rows, 1)
    plain = torch.nn.functional.linear(x, weight * layer.scale[:, None], layer.bias)
    bound = x.abs().amax(1, keepdim=True) / (layer.n_steps // 2) * weight.float().abs().sum(1) * layer.scale + 1e-4
    assert ((layer(x) - plain).abs() <= bound).all()


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if packing_engine([engine])])
def test_the_largest_sums_do_not_overflow(engine: str) -> None:
    """On processors that add pairs of products in 16 bits, an overflow would halve these sums."""
    layer = Int8Linear(torch.full((2, 64), 127, dtype=torch.int8), torch.ones(2), None, engines=[engine])
    x = torch.ones(3, 64)
    for y in (layer(x), layer(x[:1]).expand(3, 2)):
        torch.testing.assert_close(y, torch.full((3, 2), 64.0 * 127), rtol=0.01, atol=0)


def test_without_the_kernel_it_is_the_plain_product(small_model: GPT2) -> None:
    model = int8_copy(small_model, engines=())
    restored = GPT2(small_model.config).eval()
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("weight_int8"):
            weight = tensor * model.state_dict()[name.replace("weight_int8", "scale")][:, None]
            weights[name.removesuffix("_int8")] = weight if name.startswith("wte") else weight.t()
        elif not name.endswith("scale"):
            weights[name] = tensor
    restored.load_state_dict(weights)
    ids = torch.randint(0, 300, (2, 20))
    torch.testing.assert_close(model(ids), restored(ids), atol=1e-4, rtol=1e-4)


def test_a_larger_row_does_not_make_other_rows_less_exact() -> None:
    layer = Int8Linear(torch.randint(-127, 128, (8, 16), dtype=torch.int8), torch.ones(8) / 100, None)
    x = torch.randn(3, 16)
    alone = layer(x)
    together = layer(torch.cat([x, 1e4 * torch.ones(1, 16)]))[:3]
    torch.testing.assert_close(together, alone, atol=0.05 * alone.abs().amax().item(), rtol=0)


@given(rows=st.integers(2, 9), n_in=st.integers(1, 70), n_out=st.integers(1, 70), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=60)
def test_each_row_has_the_bits_of_its_own_product(rows: int, n_in: int, n_out: int, seed: int, data: st.DataObject) -> None:
    """For rows of any scale and sign, and rows of zeros. With common steps, some results would be wrong by 1%."""
    skip_unless_rows_are_rounded_alone()
    torch.manual_seed(seed)
    bias, is_lifted = torch.randn(n_out) if data.draw(st.booleans()) else None, data.draw(st.booleans())
    layer = Int8Linear(torch.randint(-127, 128, (n_out, n_in), dtype=torch.int8), torch.rand(n_out) + 0.01, bias)
    units_and_sums = layer.units_and_sums()
    torch.testing.assert_close(units_and_sums[0] * rounding.LIFT, layer.scale)
    assert torch.equal(units_and_sums[1], layer.weight_int8.sum(1).float())
    x = torch.randn(rows, n_in) * 10 ** (3 * torch.randn(rows, 1)) * (torch.rand(rows, 1) < 0.9)
    x = torch.where(torch.rand(rows, 1) < 0.3, x.abs() * torch.randn(rows, 1).sign(), x)
    packed = layer.packed_weight()
    alone = torch.cat([int8_product(row, packed, bias, is_lifted, layer.n_steps) for row in x.split(1)])
    assert torch.equal(int8_product_of_each(x, packed, bias, units_and_sums, is_lifted, layer.n_steps), alone)


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 50)], ids=["no bias", "bias"])
def test_a_weight_packed_in_parts_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, bias: Tensor | None) -> None:
    torch.manual_seed(0)
    weight, scale, x = torch.randint(-127, 128, (50, 90), dtype=torch.int8), torch.rand(50) + 0.01, torch.randn(5, 90)
    layers = []
    for rows_of_part in (50, 16):
        monkeypatch.setattr(kernels, "ROWS_OF_PART", rows_of_part)
        layer = Int8Linear(weight, scale, bias)
        layer.packed_weight()
        layers.append(layer)
    whole, in_parts = layers
    if whole.packed_weight() is not None:
        assert (len(whole.packed_weight()), len(in_parts.packed_weight())) == (1, 4)
    assert torch.equal(in_parts(x), whole(x)) and torch.equal(in_parts(x[:1]), whole(x[:1]))
    if rounds_each_alone():
        assert torch.equal(in_parts.units_and_sums(), whole.units_and_sums())
        each = [
            int8_product_of_each(x, layer.packed_weight(), bias, layer.units_and_sums(), False, layer.n_steps)
            for layer in layers
        ]
        assert torch.equal(*each)


@pytest.mark.parametrize("n_in", [90, 3072])
def test_with_sums_too_large_for_float32_rows_are_multiplied_one_by_one(n_in: int) -> None:
    skip_unless_rows_are_rounded_alone()
    layer = Int8Linear(torch.randint(60, 128, (40, n_in), dtype=torch.int8), torch.rand(40) + 0.01, torch.randn(40))
    x, packed = torch.rand(5, n_in), layer.packed_weight()
    alone = torch.cat([int8_product(row, packed, layer.bias, False, layer.n_steps) for row in x.split(1)])
    assert torch.equal(int8_product_of_each(x, packed, layer.bias, layer.units_and_sums(), False, layer.n_steps), alone)


def test_a_bias_much_larger_than_the_weights_is_refused(small_model: GPT2) -> None:
    skip_unless_rows_are_rounded_alone()
    model = int8_copy(small_model)
    assert DecodePlan(model).for_drafts is not None
    layer = model.h[1].mlp.c_fc
    layer.bias[3] = 1e4 * layer.scale[3]
    assert layer.units_and_sums() is None and DecodePlan(model).for_drafts is None


def test_common_processors_round_each_row_alone() -> None:
    """Otherwise every bug in the product of several rows would only make it unused."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has neither AVX2 nor AVX-512")
    if not kernels.multiplies_given_steps():
        pytest.skip("this version of torch lacks the operator")
    assert layers.rounds_each_alone()


@pytest.mark.parametrize("engine", ["onednn", "no operator", "other roundings"])
def test_different_rounding_is_detected(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "no operator":
        monkeypatch.setattr(torch.ops, "quantized", object())
    elif engine == "other roundings":
        monkeypatch.setattr(torch, "addcmul", lambda x, y, z: x + y * z)
        assert not layers.gives_the_bits_of_each()
        return
    assert not layers.rounds_each_alone(("onednn",) if engine == "onednn" else ENGINES)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_norm_multiplied_by_lift_gives_the_same_result(small_model: GPT2, rows: int) -> None:
    """Also without the kernel, where the scales are divided by LIFT."""
    x = torch.randn(rows, small_model.config.n_embd) * torch.logspace(-9, 3, rows)[:, None]
    for engines in (ENGINES, ()):
        block = int8_copy(small_model, engines=engines).h[0]
        with torch.inference_mode():
            norm, linear = fast_norm_and_linear(block.ln_2, block.mlp.c_fc)
            lifted = torch.layer_norm(x, x.shape[1:], norm.weight, norm.bias, norm.eps)
            torch.testing.assert_close(product(lifted, linear), block.mlp.c_fc(block.ln_2(x)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["weight_int8", "scale", "bias"])
def test_a_change_of_a_layer_is_detected(small_model: GPT2, name: str) -> None:
    layer = int8_copy(small_model).h[0].mlp.c_fc
    x = torch.randn(3, small_model.config.n_embd)
    before = layer(x)
    getattr(layer, name).mul_(-1)
    expected = {"weight_int8": 2 * layer.bias - before, "scale": 2 * layer.bias - before, "bias": before + 2 * layer.bias}
    torch.testing.assert_close(layer(x), expected[name])


def test_the_shipped_model_has_nearly_the_same_perplexity() -> None:
    model, quantized = (GPT2.from_pretrained("gpt2-tiny", dtype=dtype) for dtype in ("float32", "int8"))
    assert is_int8(quantized) and not is_int8(model)
    card = locate_model("gpt2-tiny") / "README.md"
    ids = load_tokenizer("gpt2-tiny").encode(card.read_text(encoding="utf-8"))
    ratio = evaluate(quantized, ids).perplexity / evaluate(model, ids).perplexity
    assert abs(ratio - 1) < 0.005


@pytest.mark.parametrize("n_tokens", [1, 5, 30])
def test_a_layer_of_zeros_gives_its_bias(small_model: GPT2, n_tokens: int) -> None:
    """The layer after it then gets rows of zeros."""
    model, without = int8_copy(small_model), int8_copy(small_model)
    model.h[0].mlp.c_fc.weight_int8.zero_()
    model.h[0].mlp.c_fc.bias.zero_()
    for name in ("c_fc", "c_proj"):
        getattr(without.h[0].mlp, name).weight_int8.zero_()
    without.h[0].mlp.c_proj.bias.copy_(model.h[0].mlp.c_proj.bias)
    ids = torch.randint(0, 300, (1, n_tokens))
    torch.testing.assert_close(model(ids), without(ids))
    assert model.generate(ids, max_new_tokens=3, stop_at_eot=False).shape == (1, n_tokens + 3)


def test_another_default_dtype_and_a_float_head_do_no_harm(small_model: GPT2) -> None:
    """For a single row, and for enough rows to use the kernel for many rows."""
    model, mixed = int8_copy(small_model), int8_copy(small_model)
    mixed.wte = small_model.wte
    ids = torch.randint(0, 300, (30, 9))
    for rows in (ids[:1], ids):
        expected = model.generate(rows, max_new_tokens=3)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(int8_copy(small_model).generate(rows, max_new_tokens=3), expected)
        finally:
            torch.set_default_dtype(torch.float32)
        assert mixed.generate(rows, max_new_tokens=3).shape == expected.shape


def test_cached_steps_give_the_logits_of_one_call(small_model: GPT2) -> None:
    model = int8_copy(small_model, engines=())
    ids = torch.randint(0, 300, (2, 12))
    cache = KVCache(model.config, batch_size=2)
    steps = torch.cat([model(ids[:, i : i + 1], kv_cache=cache) for i in range(12)], 1)
    torch.testing.assert_close(steps, model(ids), atol=1e-4, rtol=1e-4)


def test_generation_goes_past_the_context_with_padding(small_model: GPT2) -> None:
    model = int8_copy(small_model)
    ids = torch.randint(0, 300, (3, 9))
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1] * 9])
    assert model.generate(ids, attention_mask=mask, max_new_tokens=50, stop_at_eot=False).shape == (3, 59)


def test_saving_and_loading_keeps_every_bit(small_model: GPT2, small_folder: Path, tmp_path: Path) -> None:
    model = GPT2.from_pretrained(small_folder, dtype="int8")
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 300, (1, 9))
    for dtype in ("float32", "int8"):
        loaded = GPT2.from_pretrained(tmp_path, dtype=dtype)
        assert is_int8(loaded) and torch.equal(loaded(ids), model(ids))
    assert load_tokenizer(tmp_path).vocab_size == small_model.config.vocab_size
    n_bytes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, small_folder)]
    floats = sum(p.numel() for n, p in small_model.named_parameters() if p.dim() == 1 or n == "wpe.weight")
    assert n_bytes[0] < n_bytes[1] / 4 + 4 * floats + 4 * (300 + 2 * 9 * 24) + 5000
    with pytest.raises(CheckpointError, match="contains int8 weights, which need dtype float32"):
        GPT2.from_pretrained(tmp_path, dtype="bfloat16")


def test_transformers_refuses_to_load_it(small_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    GPT2.from_pretrained(small_folder, dtype="int8").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2-int8"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_tensor_of_another_dtype_is_named(small_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    GPT2.from_pretrained(small_folder, dtype="int8").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["h.0.mlp.c_fc.weight_int8"] = tensors["h.0.mlp.c_fc.weight_int8"].float()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"h\.0\.mlp\.c_fc\.weight_int8 is torch\.float32 instead of int8"):
        GPT2.from_pretrained(tmp_path)


def test_nan_cannot_be_quantized(small_config: GPT2Config) -> None:
    model = random_model(small_config)
    model.h[1].ln_2.bias.data[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"h\.1\.ln_2\.bias contains NaN"):
        quantize_int8(model)


def test_nan_in_a_file_is_named(small_folder: Path, tmp_path: Path) -> None:
    """The int8 kernel turns NaN into ordinary numbers, so the logits would not show it."""
    model = GPT2.from_pretrained(small_folder, dtype="int8")
    model.h[1].ln_2.bias.data[3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"h\.1\.ln_2\.bias contains NaN"):
        GPT2.from_pretrained(tmp_path)


def test_it_cannot_be_trained(small_model: GPT2, tmp_path: Path) -> None:
    model = int8_copy(small_model)
    with pytest.raises(InputError, match="in int8, which cannot be trained"):
        add_lora(model, LoRAConfig())
    (tmp_path / "text").write_text(TRAINING_TEXT * 4)
    data = prepare([tmp_path / "text"], tmp_path / "data", tokenizer="char")
    with pytest.raises(InputError, match="in int8, which cannot be trained"):
        Trainer(model, data, TrainingConfig(context=8, batch_size=1, max_steps=1), tmp_path)


def test_adapters_must_be_merged_first(small_config: GPT2Config) -> None:
    model = random_model(small_config)
    add_lora(model, LoRAConfig())
    with pytest.raises(InputError, match="merge adapters into the model first"):
        quantize_int8(model)


def test_torchs_choice_of_engine_is_unchanged(small_model: GPT2) -> None:
    before = torch.backends.quantized.engine
    int8_copy(small_model)(torch.tensor([[1, 2]]))
    assert torch.backends.quantized.engine == before


def test_packing_in_several_threads_gives_the_same_model(small_model: GPT2) -> None:
    """Each layer sets and restores the engine of the whole process, which here is one that rounds differently."""
    if len(torch.backends.quantized.supported_engines) < 3 or kernels.packing_engine() is None:
        pytest.skip("this version of torch has only one int8 kernel")
    other = next(name for name in ("onednn", "qnnpack") if name in torch.backends.quantized.supported_engines)
    before, filters = torch.backends.quantized.engine, warnings.filters[:]
    layer_by_layer = int8_copy(small_model)(torch.tensor([[1, 2]]))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        for _ in range(20):
            model = int8_copy(small_model)
            torch.backends.quantized.engine = other
            pack_together(model)
            assert torch.backends.quantized.engine == other and warnings.filters == filters
            assert all(layer.is_packed for layer in model.modules() if isinstance(layer, Int8Linear))
            assert torch.equal(model(torch.tensor([[1, 2]])), layer_by_layer)
    finally:
        torch.backends.quantized.engine = before
        torch.set_num_threads(n_threads)


def test_ids_outside_the_vocabulary_are_named(small_model: GPT2) -> None:
    for wrong in (-1, 300):
        with pytest.raises(GPT2Error, match=f"token id {wrong} is outside the vocabulary"):
            int8_copy(small_model)(torch.tensor([[wrong]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_int8_model_refuses_another_dtype_and_stays_as_it_was(dtype: torch.dtype) -> None:
    model = quantize_int8(random_model(GPT2Config(vocab_size=30, n_positions=8, n_embd=12, n_layer=2, n_head=2)))
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids)
    with pytest.raises(DeviceError, match="an int8 model computes in float32, not in") as caught:
        model.to(dtype)
    assert "\n" not in str(caught.value) and torch.equal(model(ids), before)
    assert torch.equal(model.float().to("cpu")(ids), before)
