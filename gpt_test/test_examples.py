"""The examples run and do what they say; the notebooks run; the README's pictures and the citation file are current."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import gpt2
from gpt2 import GPT2
from gpt_encoder import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
PICTURES = {"induction_heads": 4, "what_the_model_has_learned": 5}  # the fewest that a notebook draws
SLOW = {"induction_heads"}  # it trains a model


@pytest.fixture
def run(warm_commands: Path) -> Callable[..., str]:
    """A function that returns what a Python program prints, started in a folder."""
    python = warm_commands / "python" if sys.platform == "linux" else sys.executable

    def run(folder: Path, *arguments: object) -> str:
        result = subprocess.run(
            [python, *map(str, arguments)],
            cwd=folder, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def example(name: str, folder: Path = EXAMPLES) -> ModuleType:
    """An example as a module, for its functions."""
    spec = spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    head = text.split('"""')[1]
    assert re.search(rf"^    (python|torchrun .*) ?examples/{path.name}", head, re.MULTILINE), head
    assert f"examples/{path.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_character_model_learns_to_spell(run: Callable[..., str], tmp_path: Path) -> None:
    """After 200 steps nearly all words of the sample are words of the sentences; an untrained model spells none."""
    printed = run(tmp_path, EXAMPLES / "train_characters.py", "--steps", 200)
    loss = float(re.search(r"best validation loss: (\S+)", printed).group(1))
    assert loss < 0.5  # log(23) = 3.1 at the start
    module = example("train_characters")
    known = set(re.findall(r"\w+", " ".join((*module.SUBJECTS, *module.VERBS, *module.OBJECTS))))
    words = re.findall(r"\w+", printed.split("sample:\n")[1])[:-1]  # the last word may be cut
    assert len(words) > 15
    assert sum(word in known for word in words) / len(words) > 0.8, words


def test_a_character_model_of_a_file(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("abba " * 500)
    printed = run(tmp_path, EXAMPLES / "train_characters.py", "--data", "mine.txt", "--out", "mine", "--steps", 2)
    assert "a vocabulary of 4 characters" in printed
    assert not (tmp_path / "mine" / "sentences.txt").exists()


def test_a_classifier_tells_new_texts_apart(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run(tmp_path, EXAMPLES / "finetune_classifier.py", "--epochs", 8)
    accuracy = float(re.search(r"accuracy (\S+) on 12 test texts", printed).group(1))
    assert accuracy > 0.7  # random labels have 0.5
    module = example("finetune_classifier")
    labels = [re.search(rf"(\w+) \(\S+\): {re.escape(text)}", printed).group(1) for text in module.NEW_TEXTS]
    assert labels == ["good", "bad"]


def test_a_letter_can_be_left_out(run: Callable[..., str], tmp_path: Path) -> None:
    arguments = (EXAMPLES / "sampling_rule.py", "It was a big day", "--max_tokens", 80)
    printed = run(tmp_path, *arguments, "--without", "e").strip()
    assert len(printed) > 150 and "e" not in printed.lower()
    assert "e" in run(tmp_path, *arguments)


def test_rules_are_applied_to_the_logits() -> None:
    module = example("sampling_rule")
    model, tokenizer = GPT2.from_pretrained("gpt2-tiny"), load_tokenizer("gpt2-tiny")
    prompt = tokenizer.encode("Once upon a time")
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12)[0, len(prompt) :].tolist()
    assert module.generate(model, prompt, [], 12, None) == expected
    # Probabilities 0.5, 0.3, 0.15, 0.05: the entropy is 1.14 nats, and the surprises 0.69, 1.20, 1.90 and 3.00.
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert module.typical(0.1)(logits).isfinite().tolist() == [False, True, False, False]
    assert module.typical(0.5)(logits).isfinite().tolist() == [True, True, False, False]
    assert module.typical(1.0)(logits).isfinite().all()


def test_a_text_under_a_constraint(run: Callable[..., str], tmp_path: Path) -> None:
    program, answers = EXAMPLES / "constrained_text.py", (" cold", " thirsty", " a big red dog")
    printed = run(tmp_path, program, "The sun was hot, and Tom was", "--choices", *answers)
    assert printed.removeprefix("The sun was hot, and Tom was").removesuffix("\n") in answers
    pattern = r" [A-Z][a-z]+ and [A-Z][a-z]+, (met|lived) in a [a-z ]+\."
    printed = run(tmp_path, program, "Friends, named", "--regex", pattern)
    assert re.fullmatch(f"Friends, named{pattern}\n", printed)


def test_the_nearest_sentence_is_about_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Each pair of sentences of the program finds the other one, and a new sentence about eating finds eating."""
    program = example("nearest_texts")
    monkeypatch.setattr(sys, "argv", ["nearest_texts.py", "He ate a cake."])
    program.main()
    found = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    texts = [*program.SENTENCES, "He ate a cake."]
    assert found == [texts[place] for place in (1, 0, 3, 8, 5, 4, 7, 6, 3)]


def losses(printed: str) -> list[float]:
    return [float(found) for found in re.findall(r"loss:? (\d\S+)", printed)]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(run: Callable[..., str], tmp_path: Path) -> None:
    program = EXAMPLES / "train_on_two_processes.py"
    one = run(tmp_path, program, "--out", "one", "--steps", 10)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    two = run(tmp_path, *torchrun, program, "--out", "two", "--steps", 10)
    assert one.startswith("processes: 1, rows per process: 16") and two.startswith("processes: 2, rows per process: 8")
    assert len(losses(one)) == 3 and losses(one)[-1] < losses(one)[0] - 0.3
    assert losses(two) == pytest.approx(losses(one), abs=2e-4)


@pytest.mark.slow
def test_a_student_learns_from_its_teacher(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run(tmp_path, EXAMPLES / "train_a_student.py")
    assert "begins with the layers [0, 2, 5] of 6" in printed
    before, after = (float(found) for found in re.findall(r"loss.*: (\d\S+)", printed))
    assert after < before
    assert printed.splitlines()[-1].startswith("Once upon a time")


@pytest.mark.slow
def test_preferences_widen_the_margin(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run(tmp_path, EXAMPLES / "tune_on_preferences.py")
    assert printed.count("answer:'It is red.'") == 2
    for ids in re.findall(r"<\|assistant\|>: \[(.*)\]", printed):
        first, *_, last = map(int, ids.split(", "))
        assert (first, last) == (4096, 4097), "the new tokens come after those of gpt2-tiny"
    margins = [float(found) for found in re.findall(r"margin (\S+)", printed)]
    assert margins[0] == 0 and margins[-1] > 0.05 and "accuracy 1.00" in printed.splitlines()[-3]


def cleared_notebook(path: Path):
    """A notebook as nbformat reads it. It is stored without output."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (pip install -r requirements-dev.txt)")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, f"{path.name}: clear all outputs"
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_output(path: Path) -> None:
    cleared_notebook(path)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path.stem in SLOW else [], id=path.stem) for path in NOTEBOOKS],
)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (pip install -r requirements-dev.txt)")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (pip install -r requirements-dev.txt)")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install -r requirements-dev.txt)")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    notebook = cleared_notebook(path)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.get("name") == "stderr"], "a warning is printed"
    n_pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert n_pictures >= PICTURES.get(path.stem, 0)


def test_there_are_three_notebooks() -> None:
    names = ["gpt2_from_the_inside", "induction_heads", "what_the_model_has_learned"]
    assert [path.stem for path in NOTEBOOKS] == names


def test_the_pictures_show_what_the_commands_print(
    warm_commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python docs/images/readme.py` draws them again."""
    for package in ("transformers", "tiktoken"):  # `gpt2 verify` compares with those that are installed
        pytest.importorskip(package, reason=f"{package} is not installed (pip install -r requirements-dev.txt)")
    if sys.platform == "linux":
        monkeypatch.setattr(sys, "executable", str(warm_commands / "python"))  # with which it runs the commands
    monkeypatch.setattr(sys, "path", [*sys.path])  # the program extends it
    module = example("readme", ROOT / "docs" / "images")
    monkeypatch.setattr(sys, "argv", ["readme.py", str(tmp_path)])
    module.main()
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [path.name for path in drawn] == ["floors.svg", "terminal.svg"]
    for path in drawn:
        stored = (ROOT / "docs" / "images" / path.name).read_text(encoding="utf-8")
        assert path.read_text(encoding="utf-8") == stored, f"{path.name} is out of date: python docs/images/readme.py"


def test_the_citation_file_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == gpt2.__version__
    assert citation["title"] and citation["authors"] and citation["license"] == "MIT"
    assert f"## {gpt2.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
