"""Traces: each activation against its formula, names, padding, generated tokens, gradients."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpt2 import GPT2
from gpt2.adapters.lora import add_lora, lora_parameters
from gpt2.fast.plan import DecodePlan
from gpt2.inspection import Trace, activation_names, join, record, select_names, trace
from gpt2.quantization.quantize import quantize_int8
from gpt_config import GPT2Config, GPT2Error
from gpt_config.errors import InputError, InputTypeError
from gpt_config.lora_config import LoRAConfig
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model

CONFIG = GPT2Config(vocab_size=31, n_positions=16, n_embd=12, n_layer=3, n_head=3, n_inner=20, bos_token_id=0)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_model(CONFIG)


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def test_every_activation_is_its_formula(model: GPT2) -> None:
    found = trace(model, IDS)
    assert list(found) == activation_names(3)
    assert torch.equal(found.logits, model(IDS))
    x = model.wte.weight[IDS] + model.wpe.weight[:6]
    close(found["hook_embed"] + found["hook_pos_embed"], x)
    for layer, block in enumerate(model.h):
        of_block = {name: found[name, layer] for name in (
            "hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized", "hook_q", "hook_k", "hook_v", "hook_attn_scores",
            "hook_pattern", "hook_z", "hook_result", "hook_attn_out", "hook_resid_mid", "hook_mlp_in", "ln2.hook_scale",
            "ln2.hook_normalized", "hook_pre", "hook_post", "hook_mlp_out", "hook_resid_post",
        )}  # fmt: skip
        close(of_block["hook_resid_pre"], x)
        scale = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        close(of_block["ln1.hook_scale"], scale)
        close(of_block["ln1.hook_normalized"], (x - x.mean(-1, keepdim=True)) / scale)
        q, k, v = (block.attn.c_attn(block.ln_1(x)).unflatten(-1, (9, 4))[:, :, 3 * i : 3 * i + 3] for i in range(3))
        close(of_block["hook_q"], q), close(of_block["hook_k"], k), close(of_block["hook_v"], v)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / 2
        scores = torch.where(torch.ones(6, 6).tril() == 1, scores, -math.inf)
        close(of_block["hook_attn_scores"], scores)
        close(of_block["hook_pattern"], scores.softmax(-1))
        z = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
        close(of_block["hook_z"], z)
        close(of_block["hook_result"], torch.einsum("bthd,hdc->bthc", z, block.attn.c_proj.weight.view(3, 4, 12)))
        close(of_block["hook_result"].sum(2) + block.attn.c_proj.bias, of_block["hook_attn_out"])
        x = x + of_block["hook_attn_out"]
        close(of_block["hook_resid_mid"], x), close(of_block["hook_mlp_in"], x)
        close(of_block["hook_pre"], block.mlp.c_fc(block.ln_2(x)))
        close(of_block["hook_post"], torch.nn.functional.gelu(of_block["hook_pre"], approximate="tanh"))
        close(of_block["hook_mlp_out"], block.mlp.c_proj(of_block["hook_post"]))
        x = x + of_block["hook_mlp_out"]
        close(of_block["hook_resid_post"], x)
    close((x - x.mean(-1, keepdim=True)) / found["ln_final.hook_scale"], found["ln_final.hook_normalized"])


def test_only_what_was_asked_for_is_kept(model: GPT2) -> None:
    assert list(trace(model, IDS, "hook_pattern", layers=[0, -1])) == [
        "blocks.0.attn.hook_pattern",
        "blocks.2.attn.hook_pattern",
    ]
    assert list(trace(model, IDS, ["ln1.hook_scale", "hook_embed"], 1)) == ["hook_embed", "blocks.1.ln1.hook_scale"]
    assert list(trace(model, IDS, lambda name: name.endswith("2.hook_mlp_out"))) == ["blocks.2.hook_mlp_out"]
    assert list(trace(model, IDS, "blocks.1.attn.hook_[qk]")) == ["blocks.1.attn.hook_q", "blocks.1.attn.hook_k"]
    q = trace(model, IDS, "hook_q")["hook_q", 0]
    assert q.untyped_storage().nbytes() == q.nbytes  # not a view of q, k and v
    assert trace(model, IDS, "hook_z").stack("hook_z").shape == (3, 2, 6, 3, 4)


@pytest.mark.parametrize("name", ["*", "hook_pattern", "ln_final.hook_scale", "hook_pos_embed"])
def test_a_trace_leaves_no_hooks_and_does_not_change_the_logits(model: GPT2, name: str) -> None:
    before = model(IDS)
    assert torch.equal(trace(model, IDS, name).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert DecodePlan.fits(model)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("blocks.1.hook_pattern", "blocks.1.attn.hook_pattern"),
        ("hook_patern", "hook_pattern"), ("resid_post", "hook_resid_post"),
    ],
)  # fmt: skip
def test_an_unknown_name_lists_similar_ones_in_one_line(model: GPT2, name: str, near: str) -> None:
    with pytest.raises(GPT2Error, match=near.replace(".", r"\.")) as error:
        trace(model, IDS, name)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"'{name}' is not the name")
    found = trace(model, IDS, "hook_z")
    with pytest.raises(KeyError, match="not in this trace"):
        found["blocks.0.attn.hook_q"]
    assert found.get("blocks.0.attn.hook_q") is None and "hook_nothing" not in found


def test_wrong_arguments(model: GPT2) -> None:
    for arguments, kind in [
        ((torch.nn.Linear(2, 2), IDS), InputTypeError), ((model, 5), InputTypeError), ((model, []), InputTypeError),
        ((model, [[1], []]), InputError), ((model, "text"), InputError), ((model, IDS, "*", 3), InputError),
        ((model, IDS, 5), InputTypeError), ((model, [["a"]]), InputTypeError), ((model, [[1.5]]), InputError),
        ((model, torch.tensor([[99]])), InputError), ((model, IDS, [5]), InputTypeError),
    ]:  # fmt: skip
        with pytest.raises(kind):
            trace(*arguments)
    twice = random_model(CONFIG)
    twice.h[1] = twice.h[0]
    with pytest.raises(InputError, match="one module"):
        trace(twice, IDS)


@pytest.mark.parametrize("pad_left", [False, True])
def test_a_padded_row_has_the_activations_that_it_has_alone(model: GPT2, pad_left: bool) -> None:
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    tokens = slice(2, None) if pad_left else slice(None, 4)
    mask[1], mask[1, tokens] = 0, 1
    both, alone = trace(model, ids, attention_mask=mask), trace(model, ids[1:, tokens])
    for name, value in alone.items():
        row = both[name][1:]
        if name.endswith(("attn_scores", "pattern")):
            close(row[:, :, tokens, tokens], value)
        else:
            close(row[:, tokens], value)
    assert both.mask.tolist() == mask.bool().tolist()


def test_rows_of_different_lengths_are_padded(model: GPT2) -> None:
    found = trace(model, [[1, 2, 3], [4]], "hook_z")
    assert found.ids.tolist() == [[1, 2, 3], [4, 0, 0]] and found.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    close(found.logits[1:, :1], model(torch.tensor([[4]])))
    assert trace(model, [1, 2], "hook_z").ids.tolist() == [[1, 2]] == trace(model, torch.tensor([1, 2])).ids.tolist()


def test_text_is_encoded_with_the_tokenizer_of_the_folder(small_folder: Path, small_tokenizer: GPT2Tokenizer) -> None:
    small = GPT2.from_pretrained(small_folder)
    assert trace(small, "the cat", "hook_embed").ids.tolist() == [small_tokenizer.encode("the cat")]
    found = trace(random_model(small.config), ["the cat", "the"], "hook_embed", tokenizer=small_tokenizer)
    assert found.ids.shape[0] == 2


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 1}, {"num_beams": 1, "num_return_sequences": 1}])
def test_the_calls_of_generate_join_to_one_trace(model: GPT2, options: dict) -> None:
    with record(model) as traces:
        ids = model.generate(IDS, max_new_tokens=4, stop_at_eot=False, **options)
    assert [one.ids.shape[1] for one in traces] == [6, 1, 1, 1]
    joined, whole = join(traces), trace(model, ids[:, :-1])
    assert torch.equal(joined.ids, whole.ids) and list(joined) == list(whole)
    for name, value in whole.items():
        close(joined[name], value)
    close(joined.logits, whole.logits)


def test_calls_of_different_texts_do_not_join(model: GPT2) -> None:
    with record(model, "hook_pattern") as traces:
        model(IDS), model(IDS)
    for wrong in ([], traces):
        with pytest.raises(InputError):
            join(wrong)
    with record(model, "hook_z") as traces:
        model(IDS), model(IDS[:1])
    with pytest.raises(InputError, match="1 to 2 rows"):
        join(traces)


def test_a_call_that_fails_is_not_recorded(model: GPT2) -> None:
    with record(model) as traces:
        with pytest.raises(InputError):
            model(torch.tensor([[99]]))
        model(input_ids=IDS)
    assert len(traces) == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_every_activation_are_slopes(frozen: bool) -> None:
    model = random_model(CONFIG, dtype=torch.float64)
    model.requires_grad_(not frozen)
    found = trace(model, IDS, with_gradients=True)
    gradients = found.gradients(found.logits[0, -1, 7])
    assert set(gradients) == set(found)

    def logit(name: str, step: Tensor) -> float:
        from gpt2.inspection import intervene

        with intervene(model, {name: lambda value: value + step}), torch.no_grad():
            return model(IDS)[0, -1, 7].item()

    generator = torch.Generator().manual_seed(0)
    for name, gradient in gradients.items():
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64) * 1e-5
        if name.endswith("attn_scores"):
            direction = direction.tril()
        slope = (logit(name, direction) - logit(name, -direction)) / 2
        assert slope == pytest.approx((gradient.nan_to_num(0) * direction).sum().item(), rel=1e-4, abs=1e-11), name
    with pytest.raises(InputError, match="with_gradients"):
        trace(model, IDS, "hook_z").gradients(found.logits[0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, "int8"])
def test_other_dtypes(dtype: torch.dtype | str) -> None:
    model = random_model(CONFIG)
    if dtype == "int8":
        quantize_int8(model)
    else:
        model = model.to(dtype)
    found = trace(model, IDS)
    assert torch.equal(found.logits, model(IDS)) and found["hook_z", 0].dtype == model.dtype
    bias = model.h[1].attn.c_proj(torch.zeros(1, 12, dtype=model.dtype))
    close(found["hook_result", 1].float().sum(2), (found["hook_attn_out", 1] - bias).float(), 0.05)


def test_layers_with_an_adapter() -> None:
    model = random_model(CONFIG)
    add_lora(model, LoRAConfig(rank=2, target_modules=("c_proj",)))
    for parameter in lora_parameters(model):
        torch.nn.init.constant_(parameter, 0.3)
    found = trace(model, IDS)
    close(found["hook_result", 1].sum(2) + model.h[1].attn.c_proj.bias, found["hook_attn_out", 1], 1e-4)


def test_training_mode_is_restored() -> None:
    dropping = random_model(dataclasses.replace(CONFIG, attn_pdrop=0.5)).train()
    assert torch.equal(trace(dropping, IDS).logits, trace(dropping, IDS).logits) and dropping.training


def test_names_are_selected_in_the_order_of_computation() -> None:
    assert select_names(2, ["ln_final.hook_scale", "hook_embed"]) == ["hook_embed", "ln_final.hook_scale"]
    assert select_names(2, "hook_z", layers=-1) == ["blocks.1.attn.hook_z"]
    assert len(activation_names(6)) == 118


def test_a_trace_can_be_a_key(model: GPT2) -> None:
    found = trace(model, IDS, "hook_z")
    assert {found: 1}[found] == 1 and found == found and isinstance(found, Trace) and "activations" not in repr(found)
