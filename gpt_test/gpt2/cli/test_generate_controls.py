"""The controls of `gpt2 generate`: each option is the field of GenerationConfig."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt2 import GPT2, complete
from gpt_encoder import load_tokenizer


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (["--min_tokens", "9", "--ignore_eot"], {"min_new_tokens": 9, "stop_at_eot": False}),
        (["--frequency_penalty", "0.5", "--presence_penalty", "0.4"], {"frequency_penalty": 0.5, "presence_penalty": 0.4}),
        (["--repetition_penalty", "1.5", "--penalty_window", "4"], {"repetition_penalty": 1.5, "penalty_window": 4}),
        (["--no-repeat-ngram-size", "2", "--bad_words", "e"], {"no_repeat_ngram_size": 2, "bad_words": ["e"]}),
        (["--logit_bias", "5=9.5", "--logit_bias", "7=-inf"], {"logit_bias": {5: 9.5, 7: -float("inf")}}),
        (["--do_sample", "--seed", "3", "--typical_p", "0.4"], {"do_sample": True, "seed": 3, "typical_p": 0.4}),
        (["--eos_token_id", "5", "--eos_token_id", "6"], {"eos_token_id": [5, 6]}),
        (
            ["--num_beams", "3", "--length_penalty", "-1", "--early_stopping", "never"],
            {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
        ),
        (["--max_time", "60", "--top_logprobs", "3"], {"max_time": 60, "top_logprobs": 3}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_controls_reach_the_library(run_command, small_folder: Path, options, fields) -> None:
    arguments = ("--from_pretrained", small_folder, "--max_tokens", 12, "--json")
    result = run_command("generate", "The cat", *arguments, *options)
    assert (result.status, result.err) == (0, "")
    item = json.loads(result.out)
    model, tokenizer = GPT2.from_pretrained(small_folder), load_tokenizer(small_folder)
    [expected] = complete(model, tokenizer, "The cat", max_new_tokens=12, **fields)
    assert (item["ids"], item["finish_reason"]) == (expected.ids, expected.finish_reason)
    assert item.get("top_logprobs", []) == [[list(pair) for pair in step] for step in expected.top_logprobs]
