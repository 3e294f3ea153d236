"""GenerationConfig: every invalid value is an error that names the field."""

from __future__ import annotations

import dataclasses

import pytest

from gpt_config import ConfigError, GenerationConfig, GPT2Error, InputTypeError
from gpt_config.generation_config import GenerationOptions


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")), ("temperature", -0.1), ("temperature", float("inf")), ("temperature", "hot"),
        ("top_k", 0), ("top_k", -1), ("top_k", 1.5), ("top_k", True), ("top_p", 0.0), ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0), ("repetition_penalty", float("nan")),
        ("max_new_tokens", -1), ("max_new_tokens", None), ("num_beams", 0), ("num_return_sequences", 0), ("seed", -1),
        ("stop", "text"), ("stop", None), ("stop", 5), ("do_sample", "no"), ("temperature", 10**400), ("stop", ("",)),
        ("stop", (1,)), ("speculate", "yes"), ("speculate", 4),
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_value_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        GenerationConfig(**{field: value})
    assert isinstance(caught.value, GPT2Error) and "\n" not in str(caught.value)


def test_beams_and_sampling_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"num_beams=2 \(beam search\) excludes do_sample .*: choose one"):
        GenerationConfig(num_beams=2, do_sample=True)
    with pytest.raises(ConfigError, match="num_return_sequences=3 is more than num_beams=2"):
        GenerationConfig(num_beams=2, num_return_sequences=3)
    with pytest.raises(ConfigError, match=r"num_beams=2 \(beam search\) excludes speculate .*: choose one"):
        GenerationConfig(num_beams=2, speculate=True)


def test_temperature_zero_is_greedy() -> None:
    assert GenerationConfig(do_sample=True, temperature=0).greedy
    assert GenerationConfig().greedy
    assert not GenerationConfig(do_sample=True).greedy


def test_typed_options_are_the_fields() -> None:
    """Otherwise a type checker would reject a valid option or accept a misspelt one."""
    assert set(GenerationOptions.__annotations__) == {field.name for field in dataclasses.fields(GenerationConfig)}


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("max_tokens", "max_new_tokens"), ("max_length", "max_new_tokens"), ("temprature", "temperature"),
        ("topk", "top_k"), ("num_samples", "num_return_sequences"), ("stop_strings", "stop"), ("num_sample", "num_return"),
        ("min_new_tokens", "the options are max_new"), ("presence_penalty", "the options are "),
        ("usecache", "use use_cache"), ("nonsense", "max_new_tokens, do_sample"),
    ],
)  # fmt: skip
def test_the_error_for_an_unknown_option_suggests_a_similar_one(option: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option}=5 is not an option of generation: .*{nearest}") as caught:
        GenerationConfig.of(GenerationConfig(), {"seed": 1, option: 5}, parameters=("use_cache",))
    assert "\n" not in str(caught.value)


def test_a_config_of_another_type_is_an_error() -> None:
    with pytest.raises(InputTypeError, match="config must be a GenerationConfig, not dict: pass options by name"):
        GenerationConfig.of({"max_new_tokens": 1}, {})


def test_stop_may_be_a_list_or_a_tuple() -> None:
    assert GenerationConfig(stop=["a"]) == GenerationConfig(stop=("a",))
    assert hash(GenerationConfig(stop=["a"])) == hash(GenerationConfig(stop=("a",)))
