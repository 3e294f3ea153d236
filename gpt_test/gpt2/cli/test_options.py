"""Errors name a config's field by its option, and end with the option or command that helps. Help and presets of options."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shlex
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


def test_options_are_made_from_values_and_give_them_back() -> None:
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
    exposed = [parameter for parameter in command.params if parameter.expose_value]
    values = {parameter.name: parameter.get_default(click.Context(command)) for parameter in exposed}
    options = options_from(getattr(module, kind), values)
    assert values_of(options).keys() - {"data_fingerprint", "labels"} == values.keys()


COMMANDS = [load_command(name) for name in load_command(None).list_commands(click.Context(load_command(None)))]


def help_of(command: click.Command, columns: int = 80) -> dict[str, str]:
    """The options of `gpt2 COMMAND --help` by heading."""
    settings = {**command.context_settings, "terminal_width": columns}
    text = command.get_help(click.Context(command, info_name=command.name, **settings))
    return dict(re.findall(r"^(\w.*):\n((?:  .+\n?)+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", ["benchmark", "evaluate", "finetune", "generate", "score", "train"])
def test_a_command_with_many_options_has_them_in_groups(name: str) -> None:
    command = load_command(name)
    sections = help_of(command)
    assert len(sections) >= 4 and list(sections)[-1] == "Other options"
    names = re.findall(r"^  (?:-h, )?(--\w+)", sections["Other options"], re.MULTILINE)
    assert names == ["--config", "--show_config", "--help"], "every other option has a group"
    text = "".join(sections.values())
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert len(re.findall(rf"^  {parameter.opts[0]}\b", text, re.MULTILINE)) == 1
            assert parameter.help and parameter.help[0] == parameter.help.lstrip()[0] and len(parameter.help) < 200


def test_generate_has_groups_and_aligned_columns() -> None:
    sections = help_of(load_command("generate"))
    assert next(iter(sections)) == "Prompt and model" and list(sections)[-3:] == ["Speed", "Output", "Other options"]
    for heading, option in (
        ("Prompt", "--file"),
        ("Length", "--stop"),
        ("Sampling", "--top_p"),
        ("Speed", "--dtype"),
        ("Output", "--json"),
    ):
        assert option in next(lines for name, lines in sections.items() if name.startswith(heading))
    lines = "".join(sections.values()).splitlines()  # a name that is too long has its help on the next line
    columns = {found.end() for line in lines if (found := re.match(r"  -\S+(?: \S+)*  +", line))}
    assert len(columns) == 1


def test_a_command_with_few_options_has_one_list() -> None:
    assert list(help_of(load_command("tokenize"))) == ["Options"]


def test_the_examples_in_the_help_of_generate_run(run_command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("prompts.txt").write_text("Once\nTwice\n")
    text = run_command("generate", "--help").out
    examples = text[text.index("Examples:") :].splitlines()[1:]
    assert len(examples) == 3 and all(len(line) <= 80 for line in examples)
    for line in examples:
        echoed, _, call = line.rpartition("| ")
        prog, *args = shlex.split(call)
        result = run_command(*args, "--max_tokens", 3, stdin=echoed.removeprefix("    echo ").encode())
        assert prog == "gpt2" and result.status == 0 and result.out, result.err


def test_choices_are_shown_as_declared_and_accepted_in_both_spellings() -> None:
    seen = set()
    for command in COMMANDS:
        ctx = click.Context(command, **command.context_settings)
        for parameter in command.params:
            if not isinstance(parameter.type, click.Choice):
                continue
            seen.add(parameter.name)
            assert parameter.metavar or parameter.get_help_record(ctx)[0].endswith(f"[{'|'.join(parameter.type.choices)}]")
            for choice in parameter.type.choices:
                for spelled in (choice, choice.replace("-", "_"), choice.replace("_", "-")):
                    assert parameter.type_cast_value(ctx, spelled) == choice
    assert {"preset", "trainable", "task", "style"} <= seen


@pytest.mark.parametrize("name", ["train", "benchmark"])
def test_presets_have_hyphens_and_may_have_underscores(run_command, name: str) -> None:
    command = load_command(name)
    for args in (["--preset", "gpt2_xl"], ["--preset=gpt2-xl"]):
        assert command.make_context(name, args).params["preset"] == "gpt2-xl"
    result = run_command(name, "--preset", "gpt2-xxl")
    assert result.status == 2 and "'gpt2-xxl' is not one of 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'" in result.err
    assert "gpt2-xl" in run_command(name, "--help").out
    assert "gpt2_" not in result.err + run_command(name, "--help").out


def test_only_names_of_options_are_normalised() -> None:
    @click.command(cls=Command)
    @click.argument("text")
    @click.option("--max_tokens")
    @click.option("--kind", type=click.Choice(["a-b", "a_c"]))
    def command(text: str, max_tokens: str, kind: str) -> None: ...

    values = command.make_context("command", ["x-y_z", "--max-tokens", "1-2_3", "--kind=a-b"]).params
    assert values == {"text": "x-y_z", "max_tokens": "1-2_3", "kind": "a-b"}
    with pytest.raises(click.UsageError, match="'a_b' is not one of 'a-b', 'a_c'"):
        command.make_context("command", ["x", "--kind", "a_b"])


def test_names_of_options() -> None:
    assert [option_of(field) for field in ("max_new_tokens", "seed")] == ["--max_tokens", "--seed"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CheckpointError("a is damaged: go on from b", remedy=Remedy("step", "2")), "a is damaged: go on from b (--step 2)"),
        (WriteError("free disk space", remedy=Remedy("resume", "run")), "free disk space (--resume run)"),
        (CheckpointError("go on", remedy=Remedy("resume")), "go on (--resume FOLDER)"),
        (
            CheckpointError("name a tokenizer", remedy=Remedy("tokenizer", "gpt2")),
            "name a tokenizer",
        ),  # the command has no such option
        (CheckpointError("merge it", remedy=Remedy("base_model")), "merge it (gpt2 merge --from_pretrained NAME)"),
        (CheckpointError("merge it", remedy=Remedy("merge", "a b")), "merge it (gpt2 merge --out FOLDER a b)"),
        (CheckpointError("no classifier", remedy=Remedy("task", "x")), "no classifier (gpt2 finetune --task x)"),
        (ConfigError("step=3 is wrong", field="step"), "--step=3 is wrong"),
        (ConfigError("n_head=3 is wrong", field="n_head"), "n_head=3 is wrong"),  # a field of a file
        (GPT2Error("all is lost"), "all is lost"),
    ],
)
def test_an_error_names_the_options_of_its_command(error: GPT2Error, line: str) -> None:
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
