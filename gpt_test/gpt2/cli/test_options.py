"""Fields of configs are called by their options, and a command adds the option that helps to an error of the library."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from gpt2.cli.group import load_command
from gpt2.cli.options import Command, in_options_terms, option_of, options_from, values_of, wrong_options
from gpt_config import CheckpointError, ConfigError, GPT2Error, LoRAConfig, Remedy, WriteError

ROOT = Path(__file__).resolve().parents[3]


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


@dataclass(frozen=True, kw_only=True)
class SomeOptions:
    config: LoRAConfig
    files: tuple[str, ...]
    verbose: bool = False


def test_options_come_from_values_and_go_back_to_them() -> None:
    values = {"rank": 4, "dropout": 0.5, "files": ["a", "b"], "unknown": 1}
    options = options_from(SomeOptions, values)
    assert options == SomeOptions(config=LoRAConfig(rank=4, dropout=0.5), files=("a", "b"))
    assert values_of(options) == {**dataclasses.asdict(options.config), "files": ("a", "b"), "verbose": False}
    assert options_from(SomeOptions, json.loads(json.dumps(values_of(options)))) == options


@pytest.mark.parametrize(("name", "kind"), [
    ("benchmark", "BenchmarkOptions"), ("evaluate", "EvaluateOptions"), ("finetune", "FinetuneOptions"),
    ("generate", "GenerateOptions"), ("score", "ScoreOptions"), ("train", "TrainOptions"),
])  # fmt: skip
def test_every_option_has_its_field(name: str, kind: str) -> None:
    command, module = load_command(name), importlib.import_module(f"gpt2.cli.{name}")
    values = {parameter.name: parameter.get_default(click.Context(command)) for parameter in command.params}
    options = options_from(getattr(module, kind), values)
    assert values_of(options).keys() - {"data_fingerprint"} == values.keys()


def test_names_of_options() -> None:
    assert [option_of(field) for field in ("max_new_tokens", "seed")] == ["--max_tokens", "--seed"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CheckpointError("a is damaged: go on from b", remedy=Remedy("step", "2")), "a is damaged: go on from b (--step 2)"),
        (WriteError("make room", remedy=Remedy("resume", "run")), "make room (--resume run)"),
        (CheckpointError("go on", remedy=Remedy("resume")), "go on (--resume FOLDER)"),
        (
            CheckpointError("name a tokenizer", remedy=Remedy("tokenizer", "gpt2")),
            "name a tokenizer",
        ),  # it has no such option
        (CheckpointError("merge it", remedy=Remedy("base_model")), "merge it (gpt2 merge --from_pretrained NAME)"),
        (CheckpointError("merge it", remedy=Remedy("merge", "a b")), "merge it (gpt2 merge --out FOLDER a b)"),
        (CheckpointError("no classifier", remedy=Remedy("task", "x")), "no classifier (gpt2 finetune --task x)"),
        (ConfigError("step=3 is wrong", field="step"), "--step=3 is wrong"),
        (ConfigError("n_head=3 is wrong", field="n_head"), "n_head=3 is wrong"),  # of a file
        (GPT2Error("all is lost"), "all is lost"),
    ],
)
def test_a_command_tells_errors_in_its_own_terms(error: GPT2Error, line: str) -> None:
    @click.command(cls=Command)
    @click.option("--step", "from_step")
    @click.option("--resume")
    def command(from_step: str | None, resume: str | None) -> None:
        raise error

    with pytest.raises(click.ClickException) as caught:
        command.main([], standalone_mode=False)
    assert (caught.value.format_message(), caught.value.exit_code) == (line, 1)


def test_the_library_names_no_options_in_its_messages() -> None:
    paths = [path for package in ("gpt2", "gpt_config", "gpt_encoder") for path in sorted((ROOT / package).rglob("*.py"))]
    library = [path for path in paths if "cli" not in path.parts and path.name != "python_gpt2.py"]
    assert len(library) > 100
    for path in library:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"):
                assert not re.search(r"--[a-z]", ast.unparse(node)), f"{path}:{node.lineno}"


def test_extras_are_named_as_a_checkout_installs_them() -> None:
    """The package is on no index, so pip finds its extras by the path of the checkout, not by the package's name."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set()
    for package in ("gpt2", "gpt_config", "gpt_encoder", "gpt_test"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8").replace("\\", "")  # a pattern in a test escapes the brackets
            named |= {(path.name, extra) for extra in re.findall(r"pip install '([\w.-]*\[[\w,]+\])'", text)}
    assert len(named) > 10
    assert {extra for _, extra in named} <= {f".[{name}]" for name in extras}, named
