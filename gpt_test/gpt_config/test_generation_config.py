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
        ("top_k", -1), ("top_k", 1.5), ("top_k", True), ("top_p", 0.0), ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0), ("repetition_penalty", float("nan")),
        ("max_new_tokens", -1), ("max_new_tokens", None), ("num_beams", 0), ("num_return_sequences", 0), ("seed", -1),
        ("stop", "text"), ("stop", None), ("stop", 5), ("do_sample", "no"), ("temperature", 10**400), ("stop", ("",)),
        ("stop", (1,)), ("speculate", "yes"), ("speculate", 4), ("min_new_tokens", -1), ("min_new_tokens", 101),
        ("max_time", 0), ("max_time", "1s"), ("typical_p", 0), ("typical_p", 1.5), ("frequency_penalty", float("inf")),
        ("presence_penalty", None), ("penalty_window", 0), ("no_repeat_ngram_size", -1), ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: float("nan")}), ("logit_bias", {-1: 1.0}), ("logit_bias", {1: float("inf")}), ("logit_bias", 5),
        ("logit_bias", {1: True}), ("bad_words", "word"), ("bad_words", [""]), ("bad_words", [[]]), ("bad_words", [[-1]]),
        ("bad_words", [5]), ("length_penalty", "long"), ("early_stopping", "always"), ("early_stopping", 1),
        ("eos_token_id", -1), ("eos_token_id", []), ("eos_token_id", "x"), ("eos_token_id", [1.5]), ("top_logprobs", -1),
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


def test_what_contradicts_itself_is_one_line() -> None:
    with pytest.raises(ConfigError, match="min_new_tokens=3 is more than max_new_tokens=2: lower one"):
        GenerationConfig(min_new_tokens=3, max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"eos_token_id=\(4,\) names tokens .* stop_at_eot=False ignores them: choose one"):
        GenerationConfig(eos_token_id=4, stop_at_eot=False)


def test_what_peers_accept_is_accepted() -> None:
    assert GenerationConfig(top_k=0) == GenerationConfig()
    assert GenerationConfig(top_p=1, min_p=0, typical_p=1, temperature=0, early_stopping="never").greedy
    assert GenerationConfig(eos_token_id=3).eos_token_id == (3,) == GenerationConfig(eos_token_id=[3]).eos_token_id
    assert GenerationConfig(logit_bias={"7": 1, 2: -float("inf")}).logit_bias == ((2, -float("inf")), (7, 1.0))
    config = GenerationConfig(logit_bias={7: 1}, bad_words=["a", [1, 2]], eos_token_id=[1, 2])
    assert config.bad_words == ("a", (1, 2)) and hash(config) == hash(dataclasses.replace(config))
    assert dataclasses.replace(config) == config


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
        ("min_length", "the options are max_new"), ("eta_cutoff", "the options are "), ("min_tokens", "use min_new_tokens"),
        ("stop_token_ids", "use eos_token_id"), ("bad_words_ids", "use bad_words"), ("ignore_eos", "use stop_at_eot"),
        ("usecache", "use use_cache"), ("nonsense", "max_new_tokens, min_new_tokens"),
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
