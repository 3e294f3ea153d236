"""Every shell and Python block of the README runs as it stands, on a stand-in for gpt2 with random weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpt2 import GPT2
from gpt_config import GPT2Config
from gpt_test.gpt_config.test_locate import cache_repository

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """gpt2 in the hub's cache, and a `gpt2` command as pip would install it."""
    folder = tmp_path_factory.mktemp("readme")
    GPT2(GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder / "tiny")
    (folder / "cache").mkdir()
    cache_repository(str(folder / "cache"), "gpt2", folder / "tiny")
    (folder / "bin").mkdir()
    for name, target in (("gpt2", f'"{sys.executable}" -m gpt2'), ("python", f'"{sys.executable}"')):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {target} "$@"\n')
        script.chmod(0o755)
    return {
        **os.environ,
        "HF_HUB_CACHE": str(folder / "cache"),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
    }


def run(command: list[str], cwd: Path, environment: dict[str, str]) -> str:
    for name in ("generate.py", "README.md"):
        (cwd / name).symlink_to(ROOT / name)
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


SHELL_LINES = [
    line.removeprefix("pip install -r requirements.txt && ")
    for block in blocks("bash")
    for line in block.splitlines()
    if not line.endswith("pytest gpt_test")
]
# In the tests a training is shorter, and one evaluation reads part of the README: other tests check the results.
SHORTER = {
    "--max_steps 60": "--max_steps 20",
    "--epochs 20": "--epochs 2",
    "gpt2 evaluate README.md": "head -n 40 README.md > part.md && gpt2 evaluate part.md",
}


def command(text: str) -> list[str]:
    """What runs a shell line or a Python block."""
    if text in blocks("python"):
        return [sys.executable, "-W", "error", "-c", text]
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return ["bash", "-c", text]


@pytest.fixture(scope="module")
def printed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> Iterator[Callable[[str], str]]:
    """What a line or block prints. They mostly wait for imports, so two run at a time; with `pytest -n` one per process."""

    def start(text: str) -> str:
        return run(command(text), tmp_path_factory.mktemp("line"), {**environment, "OMP_NUM_THREADS": "1"})

    if "PYTEST_XDIST_WORKER" in os.environ:
        yield start
        return
    texts = [item.callspec.params["text"] for item in request.session.items if "printed" in item.fixturenames]
    with ThreadPoolExecutor(2) as pool:
        results = {text: pool.submit(start, text) for text in texts}
        yield lambda text: results[text].result()


@pytest.mark.parametrize("text", SHELL_LINES)
def test_shell_lines_run(text: str, printed: Callable[[str], str]) -> None:
    assert printed(text)


@pytest.mark.parametrize("text", blocks("python"), ids=lambda block: block.strip().splitlines()[-1][:40])
def test_python_blocks_run(text: str, printed: Callable[[str], str]) -> None:
    if "gpt2.training" in text:  # a training without it warns, which is an error here
        pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install -r requirements-dev.txt)")
    printed(text)


def test_what_is_shortened_is_in_the_readme() -> None:
    assert all(any(long in line for line in SHELL_LINES) for long in SHORTER)


def test_the_two_commands_are_there() -> None:
    assert 'pip install -r requirements.txt && python generate.py "Once upon a time" --temperature 0.7 --do_sample' in README
    assert "pip install -r requirements-dev.txt && pytest gpt_test" in README
    assert len(SHELL_LINES) >= 6 and len(blocks("python")) >= 3


def test_every_file_is_named() -> None:
    """The tree in the README is that of the packages: no file is missing from it, and none is named that is gone."""
    tree = README[README.index("gpt_config/    ") :]
    for package in ("gpt_config", "gpt_encoder", "gpt2"):
        for path in (ROOT / package).glob("*.py"):
            if not path.name.startswith("__"):
                assert f"  {path.name} " in tree, path
    for name in re.findall(r"^  (\w+\.py) ", tree, re.MULTILINE):
        assert list(ROOT.glob(f"gpt*/{name}")), name


def test_every_option_is_in_the_table() -> None:
    from gpt2.cli.generate import generate

    for parameter in generate.params:
        for option in parameter.opts:
            if option.startswith("--"):
                assert f"`{option}" in README, option
