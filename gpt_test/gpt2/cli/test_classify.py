"""`gpt2 classify` and `gpt2 evaluate --task classification`: the same figures, on the files that fine-tuning reads."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.finetuning.classifier import GPT2Classifier
from gpt2.finetuning.classifier_files import save_classifier
from gpt_encoder import GPT2Tokenizer

LABELS = ("cat", "dog", "owl", "sea")
WORDS = ["once", "the cat", "old dog by the sea", "a boat", "fish", "home again", "waited", "one evening", "asked", "far"]
ROWS = [
    (LABELS[place % 3], f"{text}, {word}") for place, (text, word) in enumerate(zip(WORDS, reversed(WORDS), strict=True))
]


@pytest.fixture(scope="session")
def classifier(small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    made = GPT2Classifier(small_model, LABELS, 30)
    torch.nn.init.normal_(made.score.weight)
    with torch.no_grad():
        made.score.weight[3] = made.score.weight[:3].mean(0)  # "sea" neither occurs nor is predicted
    folder = tmp_path_factory.mktemp("models") / "classifier"
    save_classifier(made, folder, small_tokenizer)
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "a.csv"
    path.write_text("label;text\r\n" + "".join(f"{label};{text}\r\n" for label, text in ROWS))
    return path


def written_out(pairs: list[tuple[str, str]]) -> dict[str, object]:
    """Accuracy, F1 and confusion of (actual, predicted) pairs."""
    counts = Counter(pairs)
    actual, predicted = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    f1 = {}
    for label in LABELS:
        right = counts[label, label]
        precision = right / predicted[label] if predicted[label] else 0.0
        recall = right / actual[label] if actual[label] else 0.0
        f1[label] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    occurring = {label for pair in pairs for label in pair}
    return {
        "accuracy": sum(one == other for one, other in pairs) / len(pairs),
        "f1": f1,
        "macro_f1": sum(f1[label] for label in occurring) / len(occurring),
        "labels": list(LABELS),
        "confusion": [[counts[one, other] for other in LABELS] for one in LABELS],
    }


def test_the_figures_are_those_of_a_plain_count(run_command: Callable, classifier: Path, table: Path) -> None:
    result = run_command("classify", table, "--from_pretrained", classifier)
    assert result.status == 0, result.err
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [(answer["actual"], answer["text"]) for answer in answers] == ROWS
    expected = written_out([(answer["actual"], answer["label"]) for answer in answers])
    assert 0 < expected["accuracy"] < 1, "the example must have right and wrong answers"
    measured = run_command("evaluate", table, "--task", "classification", "--from_pretrained", classifier, "--json")
    assert measured.status == 0, measured.err
    values = json.loads(measured.out)
    assert {name: values[name] for name in ("model", "task", "texts")} == {
        "model": str(classifier), "task": "classification", "texts": 10,
    }  # fmt: skip
    assert values["accuracy"] == expected["accuracy"] and values["confusion"] == expected["confusion"]
    assert values["f1"] == pytest.approx(expected["f1"]) and values["macro_f1"] == pytest.approx(expected["macro_f1"])
    shown = run_command("evaluate", table, "--task", "classification", "--from_pretrained", classifier, "--batch_size", 3)
    first = f"accuracy {expected['accuracy']:.4f} on 10 texts, macro F1 {expected['macro_f1']:.4f}"
    assert shown.out.splitlines()[0] == first and first in result.err
    matrix = [line.split()[1:5] for line in shown.out.splitlines()[3:]]
    assert matrix == [[str(count) for count in row] for row in values["confusion"]]


@pytest.mark.parametrize("command", [["classify"], ["evaluate", "--task", "classification"]])
def test_nan_is_one_line(
    run_command: Callable, small_model: GPT2, small_tokenizer: GPT2Tokenizer, table: Path, tmp_path: Path, command: list
) -> None:
    made = GPT2Classifier(small_model, LABELS)
    with torch.no_grad():
        made.score.weight[1, 2] = math.nan
    save_classifier(made, tmp_path / "model", small_tokenizer)
    result = run_command(*command, table, "--from_pretrained", tmp_path / "model")
    assert (result.status, result.out) == (1, "")
    assert result.err.splitlines()[-1].startswith("error: the model computes NaN: its weights are damaged")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("label,text\ncat,one\nmouse,two\n", "line 3: the label 'mouse' is none of the classifier's (cat, dog, owl, sea)"),
        ("label,text\ncat,one\n,two\n", "line 3: there is no label in 'label'"),
        ("label,text\ncat,one\ndog,\n", "line 3: the field 'text' is empty"),
        ("only texts\nof lines\n", "line 1: there is no label in 'label'"),
        ("label,text\n", "has no text"),
    ],
)
def test_data_that_cannot_be_measured(run_command: Callable, classifier: Path, tmp_path: Path, content: str, words) -> None:
    path = tmp_path / "b.csv"
    path.write_text(content)
    if "only" in content:
        path = path.rename(tmp_path / "b.txt")
    result = run_command("evaluate", path, "--task", "classification", "--from_pretrained", classifier)
    assert result.status == 1 and words in result.err.splitlines()[-1], result.err


def test_numbers_are_the_labels_of_a_classifier_without_names(
    run_command: Callable, small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    """transformers calls them LABEL_0 and LABEL_1; other programs write 1.0 for 1."""
    save_classifier(GPT2Classifier(small_model, ["LABEL_0", "LABEL_1"]), tmp_path / "model", small_tokenizer)
    (tmp_path / "b.csv").write_text("label,text\n0,one\n1.0,two\n1,three\n")
    result = run_command("evaluate", tmp_path / "b.csv", "--task", "classification", "--from_pretrained", tmp_path / "model",
                         "--json")  # fmt: skip
    assert result.status == 0 and [sum(row) for row in json.loads(result.out)["confusion"]] == [1, 2], result.err


def test_unknown_labels_are_said_and_the_texts_are_classified(
    run_command: Callable, classifier: Path, tmp_path: Path
) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"text": "one", "label": "mouse"}\n{"text": "two", "label": "cat"}\n')
    result = run_command("classify", path, "--from_pretrained", classifier)
    assert result.status == 0 and len(result.out.splitlines()) == 2 and "accuracy" not in result.err
    assert "labels that the classifier does not have (line 1: 'mouse'): nothing is measured" in result.err
