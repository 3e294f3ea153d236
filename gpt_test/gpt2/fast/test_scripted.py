"""Scripted functions run in TorchScript if it is available, otherwise in Python, and change no global setting.

The last tests check which models a plan must not run.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt2 import GPT2
from gpt2.fast import forward, greedy_head, linear
from gpt2.fast.limits import FastLimits
from gpt2.fast.plan import DecodePlan
from gpt2.fast.scripted import Scripted
from gpt2.kv_cache import KVCache
from gpt2.model import ACTIVATIONS
from gpt2.quantization import quantize
from gpt2.quantization.kernels import ENGINES
from gpt_config import GPT2Config
from gpt_test.conftest import random_model
from gpt_test.gpt2.fast.watching import calls_of


def halves(x: Tensor, n_times: int, names: list[str]) -> Tensor:
    for _ in range(n_times):
        x = x / 2
    return x if names[0] == "positive" else -x


def of_any_number(x: Tensor, *args: Any) -> Tensor:  # TorchScript does not support *args
    return x


@pytest.mark.parametrize(
    "function",
    [
        *(forward.scripted_run_model, forward.scripted_run_model_of_each, forward.scripted_greedy_tokens),
        *(linear.scripted_product, linear.scripted_product_of_each, greedy_head.scripted_candidates),
    ],
    ids=lambda function: function.function.__name__,
)
def test_torchscript_compiles_the_functions_of_decoding(function: Scripted) -> None:
    """Without this test, Python could run all of them, slower, and all other tests would still pass."""
    if not (hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.quantized, "linear_dynamic")):
        pytest.skip("this version of torch lacks an operator that the functions use")
    assert function.script() is not None


def test_it_computes_the_same_as_the_function_in_any_thread() -> None:
    function = Scripted(halves)
    names = function.list_of(["negative"])
    assert not isinstance(names, list)  # converted once
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(function(torch.ones(2), 3, names))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, halves(torch.ones(2), 3, ["negative"])) for result in results)


def test_python_runs_a_function_that_torchscript_cannot_compile() -> None:
    function = Scripted(of_any_number)
    assert function.script() is None
    assert function(torch.ones(1), 1, 2).item() == 1
    values = [1]
    assert function.list_of(values) is values


def test_source_that_has_changed_since_its_import_is_not_compiled(tmp_path: Path) -> None:
    file = tmp_path / "changing.py"
    file.write_text("from torch import Tensor\n\ndef f(x: Tensor) -> Tensor:\n    return x + 1\n")
    spec = importlib.util.spec_from_file_location("changing", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    unchanged, function = Scripted(module.f), Scripted(module.f)
    assert unchanged(torch.ones(1)).item() == 2 and unchanged.script() is not None
    file.write_text(file.read_text().replace("+ 1", "+ 20"))
    assert function(torch.ones(1)).item() == 2 and function.script() is None
    os.remove(file)
    gone = Scripted(module.f)
    assert gone(torch.ones(1)).item() == 2


def test_generation_does_not_change_the_warning_filters(small_model: GPT2) -> None:
    """A change lets every warning of the process be shown again, and may remain if another thread changes them too."""
    ids = torch.tensor([[1, 2]])
    small_model.generate(ids, max_new_tokens=2)
    with calls_of(warnings.catch_warnings.__init__) as calls:
        small_model.generate(ids, max_new_tokens=2)
    assert not calls


def test_no_warning_is_issued_and_no_setting_is_changed() -> None:
    before = torch._C._get_graph_executor_optimize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Scripted(halves)(torch.ones(1), 1, ["positive"])
        with pytest.raises(Exception, match="out of range"):
            Scripted(halves)(torch.ones(1), 1, [])
    assert torch._C._get_graph_executor_optimize() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "plain int8"])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_python_and_torchscript_give_the_same_bits(dtype: str, activation: str, small_config: GPT2Config) -> None:
    """For single tokens, several tokens, a padded batch, and more rows than the plan runs in TorchScript."""
    config = replace(small_config, activation_function=activation)
    model = random_model(config)
    engines = () if dtype == "plain int8" else ENGINES
    model = quantize.quantize_int8(model, engines=engines) if "int8" in dtype else model.to(getattr(torch, dtype))

    def outputs(limits: FastLimits) -> list[Tensor]:
        plan, found = DecodePlan(model, limits=limits), []
        of_each = plan.for_drafts or plan
        for rows, lengths in ((1, (3, 1, 2, 1)), (9, (6, 1, 2)), (9, (30, 1))):
            cache = KVCache(config, batch_size=rows, dtype=model.dtype)
            mask = None if rows == 1 else (torch.arange(40) >= torch.arange(rows)[:, None]).long()
            for length in lengths:
                ids = torch.arange(rows * length).view(rows, length) % config.vocab_size
                seen = None if mask is None else mask[:, : cache.length + length]
                found.append(plan.logits(plan.hidden_states(ids, attention_mask=seen, kv_cache=cache)[:, -1]))
            if rows == 1:
                found.append(
                    of_each.logits(of_each.hidden_states(ids[:, :1].expand(1, 3), attention_mask=None, kv_cache=cache)[0])
                )
                found.append(torch.tensor(plan.greedy_tokens(1, 4, None, cache)))
        return found

    with torch.inference_mode():
        by_torchscript, by_python = (outputs(FastLimits(use_torchscript=is_used)) for is_used in (True, False))
    for ours, theirs in zip(by_torchscript, by_python, strict=True):
        assert torch.equal(ours, theirs) and bool(torch.isfinite(ours).all())


def assert_no_plan(model: GPT2) -> None:
    """The plan does not fit, and the model itself generates the same ids with and without a cache."""
    assert not DecodePlan.fits(model)
    ids = torch.tensor([[1, 2, 3]])
    cached = model.generate(ids, max_new_tokens=9, stop_at_eot=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=9, stop_at_eot=False, use_cache=False))


def test_layers_of_two_kinds_have_no_plan(small_config: GPT2Config) -> None:
    model, quantized = random_model(small_config), quantize.quantize_int8(random_model(small_config))
    model.h[1].mlp.c_fc = quantized.h[1].mlp.c_fc
    assert DecodePlan.fits(quantized)
    assert_no_plan(model)


def test_an_unknown_activation_has_no_plan(small_config: GPT2Config) -> None:
    model = random_model(small_config)
    model.h[1].mlp.activation = torch.sin
    assert_no_plan(model)


def test_a_custom_block_has_no_plan(small_config: GPT2Config) -> None:
    class Skip(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None, kv_cache: Any) -> Tensor:
            return x

    model = random_model(small_config)
    model.h[1] = Skip().eval()
    assert_no_plan(model)


def test_a_subclass_of_parameter_has_no_plan(small_config: GPT2Config) -> None:
    class Own(nn.Parameter):
        pass

    model = random_model(small_config)
    model.h[0].mlp.c_fc.weight = Own(model.h[0].mlp.c_fc.weight.detach())
    assert_no_plan(model)


def test_a_model_with_more_layers_than_its_config_has_no_plan(small_config: GPT2Config) -> None:
    model = random_model(small_config)
    model.h.append(copy.deepcopy(model.h[0]))
    assert not DecodePlan.fits(model)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_copies_of_a_model_have_a_plan_too(activation: str, small_config: GPT2Config) -> None:
    model = random_model(replace(small_config, activation_function=activation))
    assert DecodePlan.fits(model) and DecodePlan.fits(copy.deepcopy(model))
