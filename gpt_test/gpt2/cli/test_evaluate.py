"""`gpt2 evaluate`: figures of texts and tasks, and errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2 import GPT2
from gpt2.evaluation import evaluate
from gpt2.training import prepare
from gpt_encoder import GPT2Tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The cat went down.\n<|endoftext|>\nThe old dog, too.\n")
    return path


def test_all_documents_are_scored_with_an_end_of_text_before_each(
    run_command: Callable, text: Path, small_folder: Path, small_model: GPT2, small_tokenizer: GPT2Tokenizer
) -> None:
    eot = small_tokenizer.eot_token_id
    ids = [eot, *small_tokenizer.encode("The cat went down."), eot, *small_tokenizer.encode("The old dog, too.")]
    expected = evaluate(small_model, ids)
    result = run_command("evaluate", text, "--from_pretrained", small_folder, "--json")
    values = json.loads(result.out)
    assert values["tokens"] == len(ids) - 1 and values["words"] == 8 and values["bytes"] == 35
    assert values["loss"] == pytest.approx(expected.loss) and values["accuracy"] == expected.accuracy
    assert values["perplexity"] == pytest.approx(math.exp(expected.loss))
    assert values["bits_per_byte"] == pytest.approx(expected.loss * (len(ids) - 1) / math.log(2) / 35)
    assert values["word_perplexity"] == pytest.approx(math.exp(expected.loss * (len(ids) - 1) / 8))


def test_a_table_and_a_stride(run_command: Callable, text: Path, small_folder: Path) -> None:
    result = run_command("evaluate", text, "--from_pretrained", small_folder, "--context", 8, "--stride", 4)
    assert result.status == 0 and "perplexity" in result.out and "bits_per_byte" in result.out


def test_a_token_file_gives_the_loss_of_training(run_command: Callable, tmp_path: Path, small_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("The cat went down to the sea. " * 60)
    data = prepare([tmp_path / "a.txt"], tmp_path / "data", tokenizer=str(small_folder))
    result = run_command("evaluate", tmp_path / "data" / "val.bin", "--from_pretrained", small_folder, "--json")
    values = json.loads(result.out)
    assert values["tokens"] == len(data.validation) - 1 and values["bytes"] == data.validation.n_bytes
    assert "words" in values and values["words"] is None


def test_wikitext_counts_the_words_of_the_original(run_command: Callable, tmp_path: Path, small_folder: Path) -> None:
    (tmp_path / "wiki.txt").write_text(" The dog , 3 @.@ 5 cats . \n")
    result = run_command(
        "evaluate", tmp_path / "wiki.txt", "--from_pretrained", small_folder, "--detokenize", "wikitext", "--json"
    )
    values = json.loads(result.out)
    assert values["words"] == 9 and values["bytes"] == len("The dog, 3.5 cats.\n")


@pytest.mark.parametrize(
    ("content", "options", "status", "words"),
    [
        (b"", [], 1, "fewer than two tokens"),
        (b"The cat", ["--stride", "41"], 2, "--stride=41"),
        (b"The cat", ["--context", "0"], 2, "--context=0"),
    ],
)
def test_each_mistake_is_one_line(
    run_command: Callable, tmp_path: Path, small_folder: Path, content: bytes, options: list[str], status: int, words: str
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    result = run_command("evaluate", tmp_path / "text.txt", "--from_pretrained", small_folder, *options)
    assert result.status == status and words in result.err and result.err.count("\n") == 1


def test_bytes_that_are_not_utf_8_are_counted(run_command: Callable, tmp_path: Path, small_folder: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"caf\xe9 caf\xe9")
    result = run_command("evaluate", tmp_path / "text.txt", "--from_pretrained", small_folder)
    assert result.status == 0 and "2 bytes of the text are not UTF-8" in result.err


@pytest.fixture
def lambada(tmp_path: Path) -> Path:
    path = tmp_path / "lambada.jsonl"
    texts = ["The cat went down to the water", "Every day the old dog", "a b"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_task_prints_figures_with_their_uncertainty_and_the_paper(
    run_command: Callable, lambada: Path, small_folder: Path
) -> None:
    result = run_command("evaluate", lambada, "--task", "lambada", "--from_pretrained", small_folder)
    assert result.status == 0 and "items           3" in result.out and " to " in result.out
    assert "1542M" in result.out and "63.24" in result.out and "stop-word filter" in result.out
    as_json = run_command(
        "evaluate", lambada, "--task", "lambada", "--from_pretrained", small_folder, "--json", "--limit", 2
    )
    values = json.loads(as_json.out)
    assert values["items"] == 2 and values["paper"]["LAMBADA PPL"]["117M"] == 35.13
    assert values["accuracy"].keys() == {"value", "standard_error", "interval_95"}
    assert values["perplexity"]["interval_95"][0] < values["perplexity"]["value"]


def test_a_task_resumes_from_its_file(run_command: Callable, tmp_path: Path, lambada: Path, small_folder: Path) -> None:
    log = tmp_path / "items.jsonl"
    args = ("evaluate", lambada, "--task", "lambada", "--from_pretrained", small_folder, "--per_item", log, "--json")
    run_command(*args, "--limit", 2)
    first = log.read_bytes()
    whole = json.loads(run_command(*args).out)
    assert log.read_bytes().startswith(first) and len(log.read_bytes().splitlines()) == 3 == whole["items"]
    assert json.loads(run_command(*args).out) == whole, "all items are in the file"
    lambada.write_text('{"text": "other data"}\n')
    refused = run_command(*args)
    assert refused.status == 1 and "belongs to another data" in refused.err and refused.err.count("\n") == 1


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("hellaswag", {"activity_label": "Sea", "ctx": "The cat", "endings": ["went.", "sat down."], "label": 0}),
        ("multiple_choice", {"query": "The cat", "choices": ["went", "sat"], "gold": 1}),
        ("multiple_choice", {"context_options": ["The cat", "A dog"], "continuation": "went", "gold": 1}),
    ],
)
def test_choices_have_two_accuracies(
    run_command: Callable, tmp_path: Path, small_folder: Path, task: str, row: dict
) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps(row))
    result = run_command("evaluate", tmp_path / "items.jsonl", "--task", task, "--from_pretrained", small_folder, "--json")
    values = json.loads(result.out)
    assert values["accuracy"]["value"] in (0, 1) and values["accuracy"]["standard_error"] is None
    assert "accuracy_norm" in values and values["paper"] == {}


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--task", "lambada", "--stride", "4"], 2, "--stride has no meaning for the task lambada"),
        (["--limit", "4"], 2, "--limit has no meaning for the task perplexity"),
        (["--task", "lambada", "--delimiter", ":"], 2, "--delimiter has no meaning"),
        (["--task", "lambada", "--batch_size", "0"], 2, "--batch_size=0"),
        (["--task", "hellaswag"], 1, "line 1: the field 'ctx' is missing"),
        (["--task", "lambada", "--per_item", "."], 1, "cannot use ."),
    ],
)
def test_each_mistake_in_a_task_is_one_line(
    run_command: Callable, lambada: Path, small_folder: Path, options: list[str], status: int, words: str
) -> None:
    result = run_command("evaluate", lambada, "--from_pretrained", small_folder, *options)
    assert result.status == status and words in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(("corpus", "row"), [("wikitext", "WikiText2 PPL"), ("ptb", "PTB PPL")])
def test_a_corpus_of_the_paper_has_its_row(
    run_command: Callable, text: Path, small_folder: Path, corpus: str, row: str
) -> None:
    result = run_command("evaluate", text, "--from_pretrained", small_folder, "--detokenize", corpus)
    assert result.status == 0 and row in result.out
    result = run_command("evaluate", text, "--from_pretrained", small_folder, "--detokenize", corpus, "--json")
    assert list(json.loads(result.out)["paper"]) == [row]
