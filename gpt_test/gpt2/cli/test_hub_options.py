"""`--revision`, and what `--verbose` says of a model's generation_config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gpt_test.gpt_config.test_locate import cache_repository


@pytest.fixture
def cached(small_folder: Path) -> str:
    """A repository in the hub's cache with the revisions main and v1."""
    import huggingface_hub.constants as constants

    snapshot = cache_repository(constants.HF_HUB_CACHE, "someone/model", small_folder)
    (snapshot.parents[1] / "refs" / "v1").write_text(snapshot.name)
    return "someone/model"


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "the cat", "--max_tokens", 2], ["score", "text.txt"],
        ["evaluate", "text.txt", "--context", 20],
    ],
)  # fmt: skip
def test_a_revision_is_an_option_or_part_of_the_name(command, cached, run_command, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 9)
    by_option = run_command(*command, "--from_pretrained", cached, "--revision", "v1")
    by_name = run_command(*command, "--from_pretrained", f"{cached}@v1")
    assert by_option.status == 0 and by_option.out == by_name.out and by_option.out
    missing = run_command(*command, "--from_pretrained", cached, "--revision", "v2")
    assert missing.status == 1 and "'someone/model@v2' is neither a folder" in missing.err


def test_quantize_takes_a_revision(cached: str, run_command, tmp_path: Path) -> None:
    assert run_command("quantize", cached, "--revision", "v1", "--out", tmp_path / "int8").status == 0
    refused = run_command("quantize", "gpt2-tiny", "--revision", "v1", "--out", tmp_path / "other")
    assert refused.status == 1 and "'gpt2-tiny' is a shipped model, which has no revisions" in refused.err


def test_a_revision_without_a_name_is_one_of_gpt2(run_command) -> None:
    result = run_command("generate", "x", "--revision", "v1")
    assert result.status == 1 and "'gpt2@v1' is neither a folder" in result.err


def test_verbose_lists_the_settings_that_are_not_applied(run_command, small_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_folder, tmp_path / "m"))
    plain = run_command("generate", "the cat", "--from_pretrained", folder, "--max_tokens", 3, "--verbose")
    assert "not applied" not in plain.err
    stated = {"do_sample": True, "temperature": 0.3, "eos_token_id": 299, "transformers_version": "5"}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    verbose = run_command("generate", "the cat", "--from_pretrained", folder, "--max_tokens", 3, "--verbose")
    [line] = [line for line in verbose.err.splitlines() if "not applied" in line]
    assert line == (
        "not applied, because options set how to generate: do_sample=True, temperature=0.3 of generation_config.json"
    )
    assert verbose.out == plain.out, "the text stays greedy"
    quiet = run_command("generate", "the cat", "--from_pretrained", folder, "--max_tokens", 3)
    assert "not applied" not in quiet.err
