"""`gpt2 evaluate`: figures of a text, and what they are shared among."""

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


def test_wikitext_counts_the_words_it_had(run_command: Callable, tmp_path: Path, small_folder: Path) -> None:
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
