"""Options from the environment and from a TOML file, their order, and `--show_config`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import click
import pytest

from gpt2.cli import option_sources
from gpt2.cli.group import load_command
from gpt2.cli.options import Command, option

NAMES = load_command(None).list_commands(click.Context(load_command(None)))


@pytest.fixture
def shown(run_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The values that are in force for `gpt2 generate`, and the comments that say where they come from."""
    monkeypatch.chdir(tmp_path)

    def show(*args: object, toml: str | None = None, command: str = "generate") -> tuple[dict, dict]:
        if toml is not None:
            Path("my.toml").write_text(toml)
            args = (*args, "--config", "my.toml")
        result = run_command(command, *args, "--show_config")
        assert result.status == 0, result.err
        lines = [line.partition(" = ")[0::2] for line in result.out.splitlines() if " = " in line]
        return tomllib.loads(result.out)[command], {key: rest.rpartition("# ")[2] for key, rest in lines}

    return show


def test_the_order_is_command_line_environment_file_default(shown, monkeypatch: pytest.MonkeyPatch) -> None:
    toml = "\ufefftop_k = 1\n[generate]\nmin_p = 0.1\ntemperature = 0.1\ntop-p = 0.1\ntop_k = 2\n[train]\nseed = 9"
    monkeypatch.setenv("GPT2_GENERATE_TEMPERATURE", "0.2")
    monkeypatch.setenv("GPT2_GENERATE_TOP_P", "0.2")
    values, places = shown("--top-p", 0.3, toml=toml)
    expected = {
        "top_p": (0.3, "command line"), "temperature": (0.2, "GPT2_GENERATE_TEMPERATURE"), "min_p": (0.1, "my.toml"),
        "top_k": (2, "my.toml"), "repetition_penalty": (1.0, "default"),
    }  # fmt: skip
    assert {name: (values[name], places[name]) for name in expected} == expected
    assert "seed" not in values


def test_what_is_shown_can_be_given_as_a_file(shown) -> None:
    args = ("--stop", 'a"\\\n\x7f', "--stop", "é", "--json", "--no_stream", "--threads", 2, "--from_pretrained", "a b")
    values, _ = shown(*args)
    again, places = shown(toml="[generate]\n" + "\n".join(f"{name} = {toml_of(value)}" for name, value in values.items()))
    assert again == values and set(places.values()) == {"my.toml"}
    assert values["stop"] == ['a"\\\n\x7f', "é"] and values["threads"] == 2 and values["stream"] is False


def toml_of(value: object) -> str:
    return json.dumps(value)


def test_flags_and_repeated_options_in_the_environment(shown, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable is one value, whatever blanks it contains. An empty one counts as unset."""
    for name, value in (("STOP", " the end "), ("JSON", "1"), ("STREAM", "no"), ("SEED", "")):
        monkeypatch.setenv(f"GPT2_GENERATE_{name}", value)
    values, _ = shown()
    assert (values["stop"], values["json"], values["stream"]) == ([" the end "], True, False) and "seed" not in values


def test_every_option_of_every_command_has_one_variable() -> None:
    for name in NAMES:
        command = load_command(name)
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        assert [option.name for option in options[-2:]] == ["config", "show_config"]
        variables = [option.envvar for option in options[:-2]]
        expected = [f"GPT2_{name}_{option.opts[0].removeprefix('--')}".upper() for option in options[:-2]]
        assert variables == expected and len(set(variables)) == len(variables)
        assert "GPT2_THREADS" not in variables


def test_a_file_for_all_commands_is_named_by_a_variable(shown, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("all.toml").write_text("device = 'cpu'")
    Path("own.toml").write_text("[tokenize]\nmodel_name = 'b'")
    monkeypatch.setenv("GPT2_CONFIG", "all.toml")
    assert [shown(command=name)[1]["device"] for name in ("generate", "chat", "train")] == ["all.toml"] * 3
    monkeypatch.setenv("GPT2_TOKENIZE_CONFIG", "own.toml")
    assert shown("text", command="tokenize")[0]["model_name"] == "b"


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("temprature = 1", "my.toml: temprature is not an option of any command (did you mean temperature?)"),
        ("[generate]\ntemprature = 1", "my.toml: temprature is not an option of gpt2 generate (did you mean temperature?)"),
        ("[train]\nbatch_sise = 1", "my.toml: batch_sise is not an option of gpt2 train (did you mean batch_size?)"),
        ("[genrate]\nseed = 1", "my.toml: [genrate] is not a command (did you mean generate?)"),
        ("[generate]\nconfig = 'a'", "my.toml: config is not an option of gpt2 generate"),
        ("[generate]\ndo_sample = 'yes'", "my.toml: do_sample = 'yes' must be true or false"),
        ('[generate]\nout = "a\\u0000"', "my.toml: out = 'a\\x00' must be a string without null bytes"),
        ("[generate]\nseed = true", "my.toml: seed = True must be a number or a string"),
        ("[generate]\nstop = [['a']]", "my.toml: stop = ['a'] must be a number or a string"),
        ("[generate]\nmax_tokens = 0.5", "'--max_tokens' (my.toml): '0.5' is not a valid integer"),
        ("[generate]\ntemperature = -1", "(set by my.toml)"),
        ("x =", "my.toml is not TOML: "),
        ("x = 1\nx = 2", "my.toml is not TOML: "),
    ],
)
def test_a_wrong_file_is_one_line(toml: str, message: str, run_command, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text(toml)
    result = run_command("generate", "Once", "--config", "my.toml")
    assert (result.status, result.out, len(result.err.splitlines())) == (2, "", 1) and message in result.err


def test_a_file_that_cannot_be_read_is_one_line(run_command, tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "none"):
        assert f"cannot read {file}" in run_command("generate", "Once", "--config", file).err
    (tmp_path / "a").write_bytes(b"\xff")
    assert "is not TOML" in run_command("generate", "Once", "--config", tmp_path / "a").err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TEMPERATURE", "hot", "'--temperature' (GPT2_GENERATE_TEMPERATURE): 'hot' is not a valid float"),
        (
            "TEMPERATURE",
            "-1",
            "--temperature=-1.0 must be 0 (greedy) or a positive number (set by GPT2_GENERATE_TEMPERATURE)",
        ),
        ("THREADS", "0", "'--threads' (GPT2_GENERATE_THREADS): 0 is not in the range"),
        ("JSON", "perhaps", "'--json' (GPT2_GENERATE_JSON): 'perhaps' is not a valid boolean"),
        ("CONFIG", "none.toml", "cannot read none.toml"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, message: str, run_command, monkeypatch) -> None:
    monkeypatch.setenv(f"GPT2_GENERATE_{name}", value)
    result = run_command("generate", "Once")
    assert (result.status, len(result.err.splitlines())) == (2, 1) and message in result.err


def test_unknown_variables_are_named(run_command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_GENERATE_TEMPRATURE", "1")
    monkeypatch.setenv("GPT2_THREADS", "1")
    result = run_command("generate", "--show_config")
    near = "GPT2_GENERATE_TEMPRATURE is the variable of no option (did you mean GPT2_GENERATE_TEMPERATURE?)"
    assert result.err == f"warning: {near}: it is ignored\n"


def test_the_variable_of_all_programs_gives_way_to_that_of_a_command(run_command, small_folder, monkeypatch) -> None:
    monkeypatch.setenv("GPT2_THREADS", "3")
    monkeypatch.setenv("GPT2_GENERATE_THREADS", "2")
    args = ("generate", "the cat", "--from_pretrained", small_folder, "--max_tokens", 1, "--verbose")
    assert "2 threads" in run_command(*args).err
    assert "1 thread" in run_command(*args, "--threads", 1).err


def test_where_a_value_comes_from() -> None:
    seen = {}

    @click.command("thing", cls=Command)
    @option("--a")
    @option("--b")
    @click.pass_context
    def thing(ctx: click.Context, a: str, b: str) -> None:
        seen["given"] = [option_sources.was_given(ctx, name) for name in ("a", "b")]
        seen["on command line"] = [option_sources.is_on_command_line(ctx, name) for name in ("a", "b")]
        seen["outranks"] = [option_sources.outranks(ctx, *names) for names in (("a", "b"), ("b", "a"))]

    thing.main([], standalone_mode=False)
    assert seen == {"given": [False, False], "on command line": [False, False], "outranks": [False, False]}
    thing.main(["--a", "1"], standalone_mode=False, default_map={"b": "2"})
    assert seen == {"given": [True, True], "on command line": [True, False], "outranks": [True, False]}


def test_json_on_the_command_line_wins_over_a_format_in_a_file(run_command, small_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("the cat")
    Path("my.toml").write_text("[score]\nformat = 'table'")
    args = ("score", "a.txt", "--from_pretrained", small_folder, "--json")
    assert json.loads(run_command(*args, "--config", "my.toml").out.splitlines()[0])
    assert "--json is --format json" in run_command(*args, "--format", "table").err


def test_a_run_is_resumed_with_the_file_that_it_was_started_with(run_command, tmp_path: Path, monkeypatch) -> None:
    """Its values count as given: the same ones change nothing, others are refused and named."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not to be, that is the question. " * 20)
    sizes = "tokenizer = 'char'\nn_layer = 1\nn_head = 1\nn_embd = 8\ncontext = 8\neval_batches = 1\nsample_tokens = 0\n"
    toml = f"[train]\nout = 'run'\ndata = 'text.txt'\n{sizes}max_steps = 2\ncheckpoint_interval = 1\nquiet = true\n"
    Path("my.toml").write_text(f"{toml}batch_size = 2\n")
    assert run_command("train", "--config", "my.toml").status == 0
    result = run_command("train", "--config", "my.toml", "--resume", "run")
    assert result.status == 0 and "has already done all of its 2 steps" in result.err
    result = run_command("train", "--config", "my.toml", "--resume", "run", "--batch_size", 3)
    assert result.status == 2 and "--batch_size cannot change when a run is resumed" in result.err
    Path("my.toml").write_text(f"{toml}batch_size = 3\n")
    result = run_command("train", "--config", "my.toml", "--resume", "run")
    assert result.status == 2 and "--batch_size=3 of my.toml cannot change" in result.err and "with 2" in result.err
    monkeypatch.setenv("GPT2_TRAIN_BATCH_SIZE", "2")
    assert run_command("train", "--config", "my.toml", "--resume", "run").status == 0


def test_a_choice_between_true_and_false_may_be_a_boolean_in_a_file(run_command, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[generate]\nnum_beams = 2\nearly_stopping = true\n")
    result = run_command("generate", "x", "--config", tmp_path / "c.toml", "--show_config")
    assert result.status == 0 and 'early_stopping = "true"' in result.out
