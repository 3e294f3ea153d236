"""Checkpoints load as they were saved; the error for a damaged one names it and the previous one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gpt2.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from gpt_config import CheckpointError, WriteError


def write(folder: Path, step: int) -> Path:
    tensors = {"model.a": torch.full((100, 3), float(step)), "optimizer.a.step": torch.tensor(float(step))}
    return save_checkpoint(folder, Checkpoint(tensors, {"step": step, "best_loss": None}))


def test_the_newest_two_are_kept_and_load(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        write(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000020.safetensors", "step-00000010.safetensors"]
    found = load_checkpoint(tmp_path)
    assert found.values == {"step": 20, "best_loss": None}
    assert torch.equal(found.tensors["model.a"], torch.full((100, 3), 20.0))
    assert load_checkpoint(tmp_path, 10).values["step"] == 10


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "header"])
def test_the_error_for_a_damaged_checkpoint_names_the_previous_one(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 10)
    path = write(tmp_path, 20)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-100:]
    elif damage == "empty":
        content.clear()
    elif damage == "flipped":
        content[-50] ^= 1
    else:
        content[0] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000020.* is damaged .*: resume from the checkpoint of step 10$"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, 10).values["step"] == 10


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    write(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"of step 11 \(it has: 10\)"):
        load_checkpoint(tmp_path, 11)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError):
        write(tmp_path / "file", 1)


def test_another_name_of_a_tensor_is_damage(tmp_path: Path) -> None:
    """The bytes of the tensors and their order are unchanged, so only a checksum that includes the names can see this."""
    tensors = {name: torch.full((4, 3), float(value)) for value, name in enumerate(("model.a", "model.b"))}
    path = save_checkpoint(tmp_path, Checkpoint(tensors, {"step": 1}))
    path.write_bytes(path.read_bytes().replace(b"model.b", b"model.c"))
    with pytest.raises(CheckpointError, match="its checksum is wrong"):
        load_checkpoint(tmp_path)


def test_another_value_is_damage(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, Checkpoint({"model.a": torch.ones(4)}, {"step": 1, "best_loss": 1.5}))
    content = path.read_bytes()
    changed = content.replace(b"1.5", b"2.5")
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="its checksum is wrong"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header", [b'{"training": "null"}', b'{"training": "[1]"}', b'{"training": "{}"}', b'{"other": "1"}']
)
def test_an_odd_header_is_one_error(tmp_path: Path, header: bytes) -> None:
    path = write(tmp_path, 3)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size])
    entries["__metadata__"] = json.loads(header)
    new = json.dumps(entries).encode()
    new += b" " * (-len(new) % 8)
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(tmp_path)
