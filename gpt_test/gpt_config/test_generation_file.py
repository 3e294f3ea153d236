"""GenerationConfig.from_pretrained: the settings of a generation_config.json mean what they mean in transformers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from gpt_config import ConfigError, GenerationConfig, GPT2Warning
from gpt_config.generation_config import generation_settings


def folder_with(tmp_path: Path, values: Any) -> Path:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, {}),
        ({"_from_model_config": True, "eos_token_id": [1, 2], "transformers_version": "5"}, {}),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50},
        ),
        ({"do_sample": True, "top_k": 0}, {"do_sample": True}),
        ({"do_sample": True, "top_k": 40}, {"do_sample": True, "top_k": 40}),
        ({"do_sample": True, "top_k": 50}, {"do_sample": True, "top_k": 50}),
        (
            {"num_beams": 4, "max_new_tokens": 7, "repetition_penalty": 1.2},
            {"num_beams": 4, "max_new_tokens": 7, "repetition_penalty": 1.2},
        ),
        ({"stop_strings": "END", "temperature": None}, {"stop": ("END",)}),
        ({"stop_strings": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"max_length": 20, "length_penalty": 1.0, "typical_p": 1, "no_repeat_ngram_size": 0, "min_new_tokens": 0}, {}),
        (
            {"min_new_tokens": 2, "max_time": 1.5, "typical_p": 0.9, "no_repeat_ngram_size": 3, "bad_words_ids": [[1, 2]]},
            {"min_new_tokens": 2, "max_time": 1.5, "typical_p": 0.9, "no_repeat_ngram_size": 3, "bad_words": [[1, 2]]},
        ),
        (
            {"num_beams": 2, "length_penalty": -0.5, "early_stopping": "never"},
            {"num_beams": 2, "length_penalty": -0.5, "early_stopping": "never"},
        ),
        (
            {"sequence_bias": [[[4], 1.5]], "suppress_tokens": [7, 9]},
            {"logit_bias": {4: 1.5, 7: -float("inf"), 9: -float("inf")}},
        ),
    ],
)
def test_settings_become_fields(stated: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = GenerationConfig.from_pretrained(folder_with(tmp_path, stated))
    assert found == GenerationConfig(**expected)


def test_options_replace_settings(tmp_path: Path) -> None:
    found = GenerationConfig.from_pretrained(folder_with(tmp_path, {"do_sample": True, "top_k": 5}), top_k=9, seed=1)
    assert found == GenerationConfig(do_sample=True, top_k=9, seed=1)


def test_the_file_that_transformers_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig(do_sample=True, temperature=0.6, top_k=30, top_p=0.8, eos_token_id=[3, 4])
    theirs.save_pretrained(tmp_path)
    expected = GenerationConfig(do_sample=True, temperature=0.6, top_k=30, top_p=0.8)
    assert GenerationConfig.from_pretrained(tmp_path) == expected


def test_settings_without_an_equivalent_are_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"sequence_bias": [[[4, 5], 1.5]], "max_length": 50, "temperature": 0.5})
    with pytest.warns(GPT2Warning, match=r"sequence_bias=\[\[\[4, 5\], 1.5\]\], max_length=50"):
        assert GenerationConfig.from_pretrained(folder) == GenerationConfig(temperature=0.5)
    assert generation_settings(folder) == {"sequence_bias": [[[4, 5], 1.5]], "max_length": 50, "temperature": 0.5}


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"temperature": "hot"}, "generation_config.json: temperature='hot' must be"), ([1], "must be a JSON object"),
        ({"do_sample": True, "num_beams": 2}, "excludes do_sample"), ({"stop_strings": [1]}, "stop=1 must be a string"),
    ],
)  # fmt: skip
def test_invalid_files_are_named(stated: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        GenerationConfig.from_pretrained(folder_with(tmp_path, stated))
    assert "\n" not in str(caught.value) and "generation_config.json" in str(caught.value)


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no generation_config.json: use GenerationConfig\(\)"):
        GenerationConfig.from_pretrained(tmp_path)
