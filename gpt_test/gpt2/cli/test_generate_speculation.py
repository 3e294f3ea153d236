"""`gpt2 generate --speculate` and `--draft_model`: the same text, and an error if the draft model does not fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from gpt2 import GPT2
from gpt_config import GPT2Config
from gpt_encoder import CharTokenizer
from gpt_test.conftest import repetitive_model


@pytest.fixture
def options(small_folder: Path) -> list[str]:
    return ["The cat", "--from_pretrained", str(small_folder), "--max_tokens", "30", "--dtype", "float64"]


@contextmanager
def drafters() -> Iterator[set[str]]:
    """The classes of the drafters that run inside: each step that may draft calls a drafter's `evidence`."""
    seen: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == "evidence":
            seen.add(type(frame.f_locals["self"]).__name__)

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def test_the_text_is_the_same(run_command, options, small_folder: Path) -> None:
    with drafters() as seen:
        text, line = run_command("generate", *options), run_command("generate", *options, "--json")
    assert not seen
    used: set[str] = set()
    for speculation in (
        ["--speculate"],
        ["--draft_model", str(small_folder)],
        ["--speculate", "--draft-model", small_folder],
    ):
        with drafters() as seen:
            assert run_command("generate", *options, *speculation) == text
        assert seen
        used |= seen
        found, expected = json.loads(run_command("generate", *options, "--json", *speculation).out), json.loads(line.out)
        assert (found["completion"], found["ids"]) == (expected["completion"], expected["ids"])
        assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-9)
    assert used == {"PromptLookup", "DraftModel"}


def test_a_draft_model_that_does_not_fit_is_one_line(run_command, options, small_model: GPT2, tmp_path: Path) -> None:
    characters = CharTokenizer.from_texts(["abc"])
    repetitive_model(GPT2Config(vocab_size=characters.vocab_size, n_embd=4, n_layer=1, n_head=1)).save_pretrained(
        tmp_path, tokenizer=characters
    )
    result = run_command("generate", *options, "--draft_model", str(tmp_path))
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"error: the draft model {tmp_path} has a vocabulary of {characters.vocab_size} tokens")
    assert result.err.count("\n") == 1
    assert run_command("generate", *options, "--draft_model", "no/such/folder").status == 1
    beams = run_command("generate", *options, "--draft_model", str(tmp_path), "--num_beams", "2")
    assert (beams.status, "choose one" in beams.err) == (2, True)
