"""Folders with faults that occur in practice: each fault is reported, and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import GPT2
from gpt2.verification import verify
from gpt2.verification.checks import Outcome, Status
from gpt2.verification.folder import folder_checks
from gpt_encoder import GPT2Tokenizer

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> Path:
    small_model.save_pretrained(tmp_path, tokenizer=small_tokenizer)
    return tmp_path


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    tensors = change({name: tensor.clone() for name, tensor in load_file(path).items()})
    save_file(tensors, path, metadata={"format": "pt"})


def outcome(folder: Path, part: str) -> Outcome:
    return next(found for found in folder_checks(folder) if found.part == part)


def test_a_sound_folder_has_no_faults(folder: Path) -> None:
    assert {found.status for found in folder_checks(folder)} <= {Status.PASS, Status.SKIPPED}


def test_names_of_a_compiled_model(folder: Path) -> None:
    rewrite(folder, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    found = outcome(folder, "weights: names")
    assert found.status == Status.FAIL and "_orig_mod." in found.note


def test_a_separate_head(folder: Path) -> None:
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["wte.weight"].clone()})
    assert outcome(folder, "weights: tied head").status == Status.PASS
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": -tensors["wte.weight"]})
    found = outcome(folder, "weights: tied head")
    assert found.status == Status.FAIL and "lm_head.weight differs" in found.note


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(folder: Path, value: float) -> None:
    def change(tensors: Tensors) -> Tensors:
        tensors["ln_f.bias"][-1] = value
        return tensors

    rewrite(folder, change)
    found = outcome(folder, "weights: finite numbers")
    assert found.status == Status.FAIL and found.note.startswith("ln_f.bias")


def test_n_ctx(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    without = {name: value for name, value in config.items() if name != "n_ctx"}
    (folder / "config.json").write_text(json.dumps(without))
    assert outcome(folder, "config: n_ctx").status == Status.WARNING
    (folder / "config.json").write_text(json.dumps({**config, "n_ctx": config["n_positions"] + 1}))
    assert outcome(folder, "config: n_ctx").status == Status.FAIL


@pytest.mark.parametrize(("more", "status"), [(7, Status.WARNING), (-1, Status.FAIL)])
def test_a_vocabulary_of_another_size(folder: Path, more: int, status: Status) -> None:
    config = json.loads((folder / "config.json").read_text())
    n_rows = config["vocab_size"] + more
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": n_rows}))
    rewrite(folder, lambda tensors: {**tensors, "wte.weight": torch.zeros(n_rows, config["n_embd"])})
    found = outcome(folder, "tokenizer: fits the vocabulary")
    assert found.status == status and str(n_rows) in found.note


def test_a_parameter_that_transformers_does_not_find(folder: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[test]')")
    assert outcome(folder, "transformers: reads the folder").status == Status.PASS
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "ln_f.bias"})
    found = outcome(folder, "transformers: reads the folder")
    assert found.status == Status.FAIL and "ln_f.bias" in found.note


def test_without_transformers_one_line_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of the other engines still run."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    outcomes = list(verify(folder))
    assert not any("transformers" in (found.subject, found.oracle) for found in outcomes)
    assert {found.status for found in outcomes} == {Status.PASS, Status.SKIPPED}
    assert {"block, backward", "greedy ids"} <= {found.part for found in outcomes}
    [line] = [found for found in outcomes if found.note]
    assert line.part == "transformers: reads the folder" and line.status == Status.SKIPPED
    assert line.note == "transformers is not installed (pip install '.[verify]')"
    (folder / "model.safetensors").unlink()
    assert outcome(folder, "transformers: reads the folder") == line


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert outcome(folder, "weights").status == Status.FAIL
