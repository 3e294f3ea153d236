"""GPT2Config: it survives a round trip through config.json, and settings that are not computed are errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_config import PRESETS, ConfigError, GPT2Config

# Numbers of parameters, counted from the published checkpoints (the head is tied to the embedding).
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
}


def count_parameters(config: GPT2Config) -> int:
    c, inner = config.n_embd, config.inner_dim
    block = 4 * c + (c * 3 * c + 3 * c) + (c * c + c) + (c * inner + inner) + (inner * c + c)
    return (config.vocab_size + config.n_positions) * c + config.n_layer * block + 2 * c


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_sizes(name: str) -> None:
    assert count_parameters(GPT2Config.preset(name)) == PARAMETERS[name]


def test_openai_names_are_the_same_presets() -> None:
    pairs = [("124M", "gpt2"), ("355M", "gpt2-medium"), ("774M", "gpt2-large"), ("1558M", "gpt2-xl")]
    assert all(GPT2Config.preset(a) == GPT2Config.preset(b) for a, b in pairs)


def test_a_preset_may_have_an_underscore_for_its_hyphen() -> None:
    assert GPT2Config.preset("gpt2_xl") == GPT2Config.preset("gpt2-xl")
    for name in (None, ["gpt2"]):
        with pytest.raises(ConfigError, match="is unknown: use one of gpt2, gpt2-medium"):
            GPT2Config.preset(name)  # type: ignore[arg-type]


def test_the_error_for_an_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(ConfigError, match=r"'gpt3' is unknown: use one of gpt2, .*1558M"):
        GPT2Config.preset("gpt3")


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPT2Config().n_layer = 3  # type: ignore[misc]


@pytest.mark.parametrize("config", [*PRESETS.values(), GPT2Config(vocab_size=99, n_embd=60, n_head=5, n_inner=7)])
def test_config_json_round_trip(config: GPT2Config, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert GPT2Config.from_json_file(path) == config


@given(
    n_head=st.integers(1, 7), head_dim=st.integers(1, 9), n_layer=st.integers(1, 5), vocab_size=st.integers(1, 10**6),
    n_positions=st.integers(1, 5000), n_inner=st.none() | st.integers(1, 99), by_layer=st.booleans(),
)  # fmt: skip
def test_round_trip_of_any_config(n_head, head_dim, n_layer, vocab_size, n_positions, n_inner, by_layer) -> None:
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=n_positions, n_embd=n_head * head_dim, n_layer=n_layer, n_head=n_head,
        n_inner=n_inner, scale_attn_by_inverse_layer_idx=by_layer,
    )  # fmt: skip
    assert GPT2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_transformers_reads_the_dump_as_the_same_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = GPT2Config(vocab_size=77, n_positions=12, n_embd=30, n_layer=3, n_head=5, n_inner=50, attn_pdrop=0.25)
    theirs = transformers.GPT2Config(**config.to_dict())
    for field in dataclasses.fields(config):
        assert getattr(theirs, field.name) == getattr(config, field.name), field.name
    assert GPT2Config.from_dict(theirs.to_dict()) == config


def test_openai_hparams(tmp_path: Path) -> None:
    path = tmp_path / "hparams.json"
    path.write_text('{"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24}')
    assert GPT2Config.from_json_file(path) == GPT2Config.preset("355M")
    assert GPT2Config.from_dict({"n_positions": 7, "n_ctx": 5}).n_positions == 7  # the field's own name wins


def test_unknown_keys_are_ignored() -> None:
    assert GPT2Config.from_dict({"n_layer": 3, "summary_type": "mean", "task_specific_params": {}}) == GPT2Config(n_layer=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"activation_function": "silu"}, "activation_function='silu' is not supported: use one of gelu_new"),
        ([1, 2], "must be a JSON object"),
    ],
)
def test_a_config_that_is_not_gpt2_is_an_error(values, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT2Config.from_dict(values)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0), ("vocab_size", "50257"), ("vocab_size", 2**62), ("n_positions", -1), ("n_layer", True),
        ("n_head", 2.0),
        ("n_embd", None),
        ("n_inner", 0), ("attn_pdrop", 1.0), ("resid_pdrop", float("nan")), ("embd_pdrop", -0.1), ("embd_pdrop", "0"),
        ("layer_norm_epsilon", 0), ("layer_norm_epsilon", 10**400), ("layer_norm_epsilon", float("inf")),
        ("initializer_range", -1.0),
        ("scale_attn_weights", 1), ("eos_token_id", -2), ("bos_token_id", "x"),
        ("activation_function", None),
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_value_names_field_and_value(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        GPT2Config(**{field: value})
    assert f"{field}={value!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heads_must_divide_channels() -> None:
    with pytest.raises(ConfigError, match="n_embd=10 is not a multiple of n_head=3"):
        GPT2Config(n_embd=10, n_head=3)


def test_a_token_id_outside_the_vocabulary_becomes_none() -> None:
    assert GPT2Config(vocab_size=100).eos_token_id is None
    assert GPT2Config(vocab_size=100, eos_token_id=99).eos_token_id == 99


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_the_error_names_a_corrupt_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        GPT2Config.from_json_file(path)


def test_the_error_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_file"):
        GPT2Config.from_json_file(tmp_path / "no_such_file")


@pytest.mark.parametrize(
    ("given", "kept", "ids"),
    [
        (7, 7, (7,)), ([7], 7, (7,)), ([7, 3, 7], (7, 3), (7, 3)), ((7, 3), (7, 3), (7, 3)), ([7, 99, -1, None], 7, (7,)),
        (-1, None, ()), (None, None, ()), ([], None, ()), ([-1], None, ()), (99, None, ()),
    ],
)  # fmt: skip
def test_end_tokens_are_one_id_a_list_or_none(given: object, kept: object, ids: tuple[int, ...]) -> None:
    config = GPT2Config.from_dict({"vocab_size": 20, "eos_token_id": given})
    assert (config.eos_token_id, config.eos_token_ids) == (kept, ids)
    assert GPT2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("given", "named"), [([3, True], "True"), ([[3]], r"\[3\]"), (["</s>"], "'</s>'"), ({}, "{}")])
def test_the_error_for_an_invalid_end_token_names_it(given: object, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^eos_token_id={named} must be a whole number of 0 or more .or -1 for none."):
        GPT2Config(eos_token_id=given)  # type: ignore[arg-type]


def test_a_bos_token_of_minus_1_is_none() -> None:
    assert GPT2Config(bos_token_id=-1).bos_token_id is None
