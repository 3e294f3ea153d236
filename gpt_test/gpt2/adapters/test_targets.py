"""Targets of adapters match the layers that peft's rule matches, and no regular expression runs for ever."""

from __future__ import annotations

import time

import pytest

from gpt2 import GPT2
from gpt2.adapters.lora import target_configs
from gpt2.adapters.targets import layer_configs, matching
from gpt_config import ConfigError, LoRAConfig


@pytest.mark.parametrize(
    ("targets", "hit", "missed"),
    [
        (("c_proj",), ["transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_proj"], ["transformer.h.0.attn.xc_proj"]),
        (("mlp.c_proj",), ["transformer.h.1.mlp.c_proj"], ["transformer.h.1.attn.c_proj"]),
        (("transformer.h.0.attn.c_attn",), ["transformer.h.0.attn.c_attn"], ["transformer.h.1.attn.c_attn"]),
        (r".*\.h\.[02]\..*c_attn", ["transformer.h.2.attn.c_attn"], ["transformer.h.1.attn.c_attn"]),
        ("c_attn", [], ["transformer.h.0.attn.c_attn"]),  # a string must match the whole name
    ],
)
def test_targets(targets, hit: list[str], missed: list[str]) -> None:
    config = LoRAConfig(target_modules=targets)
    for name in hit + missed:
        assert any(matching(config, target, [name]) for target in config.targets) == (name in hit)


@pytest.mark.parametrize("pattern", [r"(?:.|[a-z]|\w|\.)*[0-9]{2}", r"(?:.*?)*\d\d", r"(.+?)*(?<=\d)"])
def test_a_pattern_that_never_ends_is_one_error(pattern: str) -> None:
    """Python's `re` needs years for each of these on the name of a layer."""
    names = [f"transformer.h.{layer}.attn.c_attn" for layer in range(40)]
    config, began = LoRAConfig(target_modules=pattern), time.monotonic()
    with pytest.raises(ConfigError, match=r"target_modules=.* takes more than 0\.2 seconds") as caught:
        matching(config, pattern, names, limit=0.2)
    assert time.monotonic() - began < 120 and "\n" not in str(caught.value)


def test_the_layers_of_a_model_are_matched_in_bounded_time(small_model: GPT2) -> None:
    with pytest.raises(ConfigError, match=r"target_modules=.* takes more than 0\.5 seconds"):
        target_configs(small_model, LoRAConfig(target_modules=r"(.+?)*(?<=\d)"))


def test_the_first_pattern_that_matches_counts() -> None:
    config = LoRAConfig(rank=4, alpha=8, rank_pattern={"h.0.attn.c_attn": 2, "c_attn": 3}, alpha_pattern={r"h\.1\..*": 1})
    layers = layer_configs(config, [f"transformer.h.{number}.attn.c_attn" for number in (0, 1, 10)]).values()
    assert [(layer.rank, layer.alpha) for layer in layers] == [(2, 8), (3, 1), (3, 8)]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", [r"(?:.|[a-z]|\w|\.)*[0-9]{2}", r"(.+?)*(?<=\d)"])
def test_a_pattern_for_ranks_that_never_ends_is_one_error(field: str, pattern: str) -> None:
    names, began = [f"transformer.h.{layer}.attn.c_attn" for layer in range(40)], time.monotonic()
    with pytest.raises(ConfigError, match=rf"{field}=.* takes more than 0\.2 seconds") as caught:
        layer_configs(LoRAConfig(**{field: {pattern: 2}}), names, limit=0.2)
    assert time.monotonic() - began < 120 and "\n" not in str(caught.value)
