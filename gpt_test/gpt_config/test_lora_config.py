"""LoRAConfig and AdapterConfig: invalid and unsupported values are errors that name the field; others survive JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt_config import AdapterConfig, CheckpointError, ConfigError, LoRAConfig

PEFT = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0), ("rank", True), ("rank", 8.0), ("rank", 10**9), ("alpha", 0), ("alpha", float("nan")), ("alpha", "16"),
        ("alpha", 1e300), ("alpha", 1e300 * 1e300), ("target_modules", "a" * 20_000),
        ("dropout", 1.0), ("dropout", -0.1), ("use_rslora", 1), ("target_modules", ()), ("target_modules", ""),
        ("target_modules", None), ("target_modules", (1,)), ("target_modules", ("c_attn", "")), ("target_modules", "("),
        ("target_modules", {"c_attn"}),
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_value_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        LoRAConfig(**{field: value})
    assert "\n" not in str(caught.value)


def test_a_list_of_targets_becomes_a_tuple_so_the_config_is_hashable() -> None:
    config = LoRAConfig(target_modules=["c_attn"])
    assert config.target_modules == ("c_attn",) and hash(config) == hash(LoRAConfig(target_modules=("c_attn",)))


def test_scale() -> None:
    assert LoRAConfig(rank=4, alpha=6).scale == 1.5
    assert LoRAConfig(rank=4, alpha=6, use_rslora=True).scale == 3.0


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(lora=LoRAConfig(rank=3, alpha=0.5, dropout=0.25, target_modules=("c_fc",)), base_model="gpt2"),
        AdapterConfig(lora=LoRAConfig(target_modules=".*c_fc", use_rslora=True), task_type="SEQ_CLS"),
        AdapterConfig(
            lora=LoRAConfig(layers_to_transform=(0, 3), rank_pattern=(("c_fc", 2),), alpha_pattern=(("h.0", 0.5),))
        ),
        AdapterConfig(lora=LoRAConfig(modules_to_save=("wte", "ln_f"))),
    ],
)
def test_json_round_trip(config: AdapterConfig, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_dict()))
    assert AdapterConfig.from_json_file(tmp_path / "adapter_config.json") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not 'LORA'"),
        ({"peft_type": None}, "peft_type=None"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type='SEQ_2_SEQ_LM' is not one of CAUSAL_LM, SEQ_CLS"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"rank_pattern": {"c_attn": 0}}, "rank_pattern: c_attn=0"),
        ({"rank_pattern": {"c_(": 2}}, "rank_pattern=.* must map"),
        ({"alpha_pattern": [1]}, "alpha_pattern=.* must map"),
        ({"layers_to_transform": [-1]}, "layers_to_transform=-1"),
        ({"layers_to_transform": "0"}, "layers_to_transform='0'"),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, "layers_pattern='layers'"),
        ({"exclude_modules": ["c_fc"]}, "exclude_modules="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"revision": "v2"}, "revision='v2'"),
        ({"modules_to_save": ["mlp"]}, "modules_to_save="),
        ({"modules_to_save": "wte"}, "modules_to_save='wte' must be a list"),
        ({"modules_to_save": ["score"]}, "modules_to_save="),  # without a classifier
        ({"invented_in_2030": 1}, "invented_in_2030=1 is not supported"),
        ({"r": None}, "r is missing"),
        ({"r": 0}, "rank=0"),
        ({"lora_alpha": "x"}, "alpha='x'"),
        ({"target_modules": {"c_attn": 1}}, "target_modules="),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3"),
    ],
)
def test_unsupported_settings_are_errors(changes: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(PEFT | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        AdapterConfig.from_json_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [
    {"task_type": None}, {"fan_in_fan_out": False}, {"use_dora": False}, {"rank_pattern": {}}, {"modules_to_save": None},
    {"init_lora_weights": "gaussian"}, {"revision": "main"}, {"invented_in_2030": None}, {"inference_mode": False},
    {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
])  # fmt: skip
def test_settings_without_effect_are_accepted(changes: dict) -> None:
    assert AdapterConfig.from_dict(PEFT | changes).lora == LoRAConfig(rank=4, alpha=8, target_modules=("c_attn",))


@pytest.mark.parametrize("content", ["{", "[1]", "", "[" * 100_000, "\udcff"])
def test_the_error_names_a_damaged_file(content: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        AdapterConfig.from_json_file(path)


@pytest.mark.parametrize("field", ["target_modules", "layers_to_transform", "modules_to_save"])
def test_lists_are_bounded(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} has 2000 entries: it may have 1000"):
        LoRAConfig(**{field: [0 if field == "layers_to_transform" else "wte"] * 2000})


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_are_bounded(field: str) -> None:
    config = LoRAConfig(rank=4, **{field: {"h.0.attn.c_attn": 2, "c_attn": 3}})
    assert hash(config) == hash(LoRAConfig(rank=4, **{field: getattr(config, field)}))
    for pattern in ({"a" * 20_000: 1}, {f"h.{n}": 1 for n in range(2000)}, {"c_attn": 1e300}, {"c_attn": 0}, {"(": 1}):
        with pytest.raises(ConfigError, match=field) as caught:
            LoRAConfig(**{field: pattern})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
