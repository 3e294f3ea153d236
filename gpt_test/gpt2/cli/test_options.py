"""Fields of configs are called by their options."""

from __future__ import annotations

import click
import pytest

from gpt2.cli.options import in_options_terms, option_of, wrong_options
from gpt_config import ConfigError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("top_k=0 must be 1", field="top_k"), "--top_k=0 must be 1"),
        (
            ConfigError("max_new_tokens=-1 must be 0 or more max_new_tokens", field="max_new_tokens"),
            "--max_tokens=-1 must be 0 or more max_new_tokens",
        ),
        (
            ConfigError("num_beams=2 is less than num_return_sequences=3", field="num_beams",
                        other_fields=("num_return_sequences", "do_sample")),
            "--num_beams=2 is less than num_return_sequences=3 (num_return_sequences is --num_samples)",
        ),
        (ConfigError("a/config.json: n_head=0 must be 1", field="n_head"), "a/config.json: n_head=0 must be 1"),
        (ConfigError("instructions need another model"), "instructions need another model"),
    ],
)  # fmt: skip
def test_a_message_names_the_option(error: ConfigError, line: str) -> None:
    assert in_options_terms(error) == line
    with pytest.raises(click.UsageError) as caught, wrong_options():
        raise error
    assert caught.value.format_message() == line


def test_names_of_options() -> None:
    assert [option_of(field) for field in ("max_new_tokens", "seed")] == ["--max_tokens", "--seed"]
