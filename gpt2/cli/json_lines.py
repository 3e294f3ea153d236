"""`--json`, one rule for all commands: stdout has one JSON object per line and nothing else.

Every line is ASCII, so no terminal or pipe can change it. JSON has no NaN and no infinity: such numbers are null. The same
thing has the same name in every command: `model` is the model's name; `ids`, `pieces`, `byte_spans` and `logprobs` are lists
with an item per token, and an object of a single token has `id`, `piece`, `byte_span` and `logprob`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from gpt2.cli.options import option
from gpt_config.json_text import to_json


def json_option(content: str) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """The flag `--json`, as the parameter `as_json`. `content` says what there is an object of, and its fields."""
    text = f"Print one JSON object per line and nothing else on stdout: {content}."
    return option("--json", "as_json", is_flag=True, group="Output", help=text)


def json_line(values: Mapping[str, Any]) -> str:
    """The object as one line of ASCII, without the line end."""
    return to_json(values)
