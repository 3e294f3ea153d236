"""`gpt2 benchmark`: every section on a tiny model, the table, the JSON, the picture, and errors. No test asserts a time."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gpt2.benchmark.bench import Bench, Measure, Parts
from gpt2.benchmark.engines import open_engine
from gpt2.benchmark.processes import run_python
from gpt2.benchmark.scaling_process import TASKS
from gpt2.benchmark.settings import OURS
from gpt2.benchmark.tokenizing import tokenizing
from gpt2.benchmark.training import LEARNERS, Learner, training
from gpt2.cli.group import cli
from gpt_test.conftest import TRAINING_TEXT

SIZES = [
    "--rounds", 2, "--prompt_tokens", 6, "--new_tokens", 4, "--prefill_tokens", 8, "--batch_sizes", "1,3", "--train_rows", 2,
    "--train_context", 40, "--threads", 1,
]  # fmt: skip


@pytest.fixture
def options(small_folder: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "story.txt").write_text(TRAINING_TEXT)
    return ["--from_pretrained", small_folder, "--text", tmp_path / "story.txt", *SIZES]


def run_with(parts: Parts, *args: object) -> Result:
    """Run `gpt2 benchmark` with other parts."""
    return CliRunner().invoke(cli, ["benchmark", *map(str, args)], obj=parts, catch_exceptions=False)


def test_busy_processes_run_while_engines_do(options: list[object]) -> None:
    def children() -> set[str]:
        return set(Path("/proc/self/task", str(os.getpid()), "children").read_text().split())

    seen: list[set[str]] = []
    if not Path("/proc/self/task", str(os.getpid()), "children").exists():
        pytest.skip("this system does not list the children of a process")
    before = children()
    measures = [Measure(("decode",), lambda bench: seen.append(children() - before))]
    result = run_with(Parts(measures=measures), *options, "--sections", "decode", "--peers", "none", "--beside", 2)
    assert result.exit_code == 0 and "1 thread beside 2 busy processes, " in result.stdout
    assert len(seen[0]) == 2 and not seen[0] & children(), "they end with the benchmark"
    assert json.loads(result.stdout.splitlines()[-1])["settings"]["beside"] == 2


def test_sections_in_one_process(options: list[object], tmp_path: Path) -> None:
    peers = ["transformers", "tiktoken", "tokenizers"]
    for package in (*peers, "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install -r requirements-dev.txt)")
    sections = ["tokenizer", "decode", "prefill", "batch", "training"]
    picture = tmp_path / "picture.png"
    chosen = ["--sections", ",".join(sections), "--peers", ",".join(peers), "--dtypes", "float32", "--dtype", "bfloat16"]
    # Engines run in this process: in separate processes each would import torch, which takes seconds.
    result = run_with(Parts(open_engine=open_engine), *options, *chosen, "--plot", picture)
    assert result.exit_code == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    for section in sections:
        assert section in lines
    values = json.loads(last)
    assert values["environment"]["threads"] == 1 and values["environment"]["versions"]["torch"]
    assert list(values["peers"]) == peers and not values["left_out"]
    assert values["settings"]["texts"].startswith("story.txt") and values["memory"]["gigabytes_per_second"] > 0
    rows = values["rows"]
    assert {row["section"] for row in rows} == set(sections)
    compared = [row for row in rows if row["engine"] in ("tiktoken", "tokenizers", "transformers")]
    assert all(row["agrees"] is True for row in compared if row["dtype"] != "bfloat16")
    # The tokens after the first take so little time here that noise may exceed it.
    sure = [row for row in rows if row["setting"] != "after the first token"]
    assert all(row["low"] <= row["median"] <= row["high"] for row in sure)
    assert all(row["times_as_fast"] > 0 for row in sure if row["engine"] not in (OURS, "memory"))
    assert all(row["share_of_limit"] > 0 for row in rows if row["section"] == "training")
    assert {row["number"] for row in rows if row["section"] == "batch"} == {1, 3}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "decode: 2 rounds" in result.stderr


def test_sections_in_processes_of_their_own(options: list[object]) -> None:
    """Torch takes seconds to import, so scaling runs in this process, and the command that load starts twice runs once."""
    answers: dict[tuple[str, ...], str] = {}
    started: list[tuple[str, ...]] = []

    def run(arguments: list[str], threads: int) -> str:
        if arguments[:2] == ["-m", "gpt2.benchmark.scaling_process"]:
            return json.dumps(TASKS[arguments[2]](**json.loads(arguments[3])))
        started.append(tuple(arguments))
        if started[-1] not in answers:
            answers[started[-1]] = run_python(arguments, threads)
        return answers[started[-1]]

    folder = options[1]
    chosen = [
        "--sections",
        "load,scaling",
        "--peers",
        "none",
        "--dtypes",
        "float32",
        "--sizes",
        folder,
        "--contexts",
        "8,32,99",
    ]
    result = run_with(Parts(run_python=run), *options, "--rounds", 1, *chosen)
    assert result.exit_code == 0, result.stderr
    assert len(started) == 2 and len(answers) == 1
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert [(row["section"], row["unit"], row["number"]) for row in rows] == [
        ("load", "s", None), ("scaling", "ms/token", 8), ("scaling", "ms/token", 32),
        ("scaling", "MB", None), ("scaling", "MB", None),
    ]  # fmt: skip
    assert rows[0]["agrees"] is True and rows[0]["median"] > 0 and rows[-1]["median"] > 1


@pytest.mark.slow
def test_scaling_in_processes_of_its_own(run_command: Callable, options: list[object]) -> None:
    chosen = ["--sections", "scaling", "--dtypes", "float32", "--sizes", options[1], "--contexts", "8", "--peers"]
    result = run_command("benchmark", *options, *chosen, "transformers")
    values = json.loads(result.out.splitlines()[-1])
    assert [row["engine"] for row in values["rows"]] == [OURS] * 3 + ["transformers"] * 3 and not values["left_out"]


def test_a_peer_that_is_not_installed_and_a_size_without_room(options: list[object]) -> None:
    parts = Parts(
        installed_version=lambda name: None if name == "llama-cpp-python" else "1", free_memory=lambda: 7_000_000_000
    )
    chosen = ["--sections", "scaling", "--peers", "llama-cpp-python", "--sizes", "1558M"]
    result = run_with(parts, *options, *chosen)
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout.splitlines()[-1])
    assert values["peers"] == {"llama-cpp-python": "llama-cpp-python not installed"}
    reasons = [item["reason"] for item in values["left_out"]]
    assert reasons[0].startswith("llama-cpp-python not installed (pip install")
    assert reasons[1] == "not enough memory: it needs 7.2 GB, and 7.0 GB are free"
    assert len(reasons) == 2 and all(reason in result.stdout for reason in reasons)


@pytest.mark.parametrize("name", [OURS, "transformers"])
def test_a_training_step_that_fails_stops_nothing_else(options: list[object], name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[test]')")

    def without_memory() -> None:
        raise RuntimeError("out of memory")

    def make(*arguments: Any) -> Learner:
        return dataclasses.replace(LEARNERS[name](*arguments), step=without_memory)

    def measure(bench: Bench) -> None:
        training(bench, LEARNERS | {name: make})

    parts = Parts(measures=[Measure(("tokenizer",), tokenizing), Measure(("training",), measure)])
    chosen = ["--sections", "tokenizer,training", "--peers", "transformers", "--dtypes", "float32"]
    result = run_with(parts, *options, *chosen)
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout.splitlines()[-1])
    assert [(item["engine"], item["reason"]) for item in values["left_out"]][:1] == [
        (name, "failed with RuntimeError: out of memory")
    ]
    measured = [row["engine"] for row in values["rows"] if row["section"] == "training"]
    assert measured == ([] if name == OURS else [OURS])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--sections", "decode,speed"], "--sections='speed' is unknown: there are tokenizer, decode, prefill, batch"),
        (["--peer", "vllm"], "--peers='vllm' is unknown: there are transformers, ctranslate2, llama-cpp-python"),
        (["--dtypes", "int4"], "--dtypes='int4' is unknown: there are float32, bfloat16, float16, int8"),
        (["--threads", "0"], "--threads=0 must be a whole number of 1 or more"),
        (["--new_tokens", "1"], "--new_tokens=1 must be a whole number of 2 or more"),
        (["--batch_sizes", "1,many"], "--batch_sizes='many' must be whole numbers with commas between them"),
        (["--sections", ","], "--sections is empty: give at least one of"),
        (
            ["--preset", "gpt3"],
            "Invalid value for '--preset': 'gpt3' is not one of 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'",
        ),
        (["--preset", "gpt2", "--from_pretrained", "gpt2"], "--preset is for random weights"),
    ],
)
def test_wrong_calls_are_one_line(run_command: Callable, wrong: list[str], message: str) -> None:
    result = run_command("benchmark", *wrong)
    assert result.status == 2 and not result.out
    assert result.err.startswith(f"error: {message}") and len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--prompt_tokens", "40"], "prompt_tokens + new_tokens is 44, and the model sees 40 tokens: choose less"),
        (["--train_context", "41"], "train_context is 41, and the model sees 40 tokens: choose less"),
        (["--text", "no-such-file"], "No such file or directory: no-such-file"),
        (["--plot", "picture.txt"], "plot='picture.txt' must end with one of .png, .svg, .pdf"),
        (["--from_pretrained", "no-such-model"], "no-such-model"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available: this machine has cpu"),
        (["--device", "gpu"], "device 'gpu' is unknown: this machine has cpu"),
    ],
)
def test_other_mistakes_are_one_line(run_command: Callable, options: list[object], wrong: list[str], message: str) -> None:
    result = run_command("benchmark", *options, *wrong)
    assert result.status == 1 and not result.out and "Traceback" not in result.err
    assert message in result.err.splitlines()[-1] and result.err.splitlines()[-1].startswith("error: ")
