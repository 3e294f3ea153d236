"""Save and load the state of a run: weights and optimizer state in one safetensors file, other values as JSON in its header.

Nothing is unpickled. A checkpoint is written completely or not at all, and the previous one is kept. Random states and the
position in the data are not stored, because both follow from the seed and the step (see `batches` and `trainer`).
"""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from gpt2.weights.safetensors_header import read_header
from gpt_config.atomic_write import atomic_write
from gpt_config.errors import CheckpointError, Remedy, WriteError
from gpt_config.file_reading import parse_json

_NAME = re.compile(r"step-(\d{8})\.safetensors")
_KEPT = 2  # checkpoints of a run
# The values of checkpoints that were written before values had a checksum.
_OLD_KEYS = {"step", "best_loss", "n_since_best", "scaler", "checksum"}


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` by name ("model.…", "optimizer.…"), and `values` that JSON can represent, among them "step"."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


# torch.distributed.checkpoint gathers and distributes the state, because it handles modules that DDP, FSDP or torch.compile
# have wrapped. It returns the whole state under plain names, so a checkpoint does not depend on the number of processes that
# wrote it.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return all weights of `module`, unsharded, on the CPU. Every process must call it; only rank 0 gets the weights."""
    weights: dict[str, Any] = get_model_state_dict(module, options=_WHOLE)
    return weights


def gather_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights ("model.…") and optimizer state ("optimizer.….exp_avg") by name.

    Every process must call it; only rank 0 gets the tensors.
    """
    tensors = {f"model.{name}": tensor for name, tensor in whole_weights(module).items()}
    whole: dict[str, Any] = {**get_optimizer_state_dict(module, optimizer, options=_WHOLE)}
    for name, values in whole.get("state", {}).items():
        tensors.update({f"optimizer.{name}.{moment}": tensor for moment, tensor in values.items()})
    return tensors


def restore_state(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of `gather_state`. Every process calls it with the same tensors and keeps its own part."""
    options = StateDictOptions(full_state_dict=True)
    weights: dict[str, Any] = _with_prefix(tensors, "model.")
    set_model_state_dict(module, weights, options=options)
    state: dict[str, Any] = {}
    for name, tensor in _with_prefix(tensors, "optimizer.").items():
        parameter, _, moment = name.rpartition(".")
        state.setdefault(parameter, {})[moment] = tensor
    if state:
        # The optimizer already has learning rate and weight decay, from the configuration.
        whole: dict[str, Any] = {**get_optimizer_state_dict(module, optimizer, options=options), "state": state}
        set_optimizer_state_dict(module, optimizer, whole, options=options)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder`/step-NNNNNNNN.safetensors, delete all but the newest two checkpoints, and return the path.

    WriteError if the disk is full or the folder cannot be written.
    """
    path = folder / f"step-{checkpoint.values['step']:08}.safetensors"
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    values = json.dumps(
        {**checkpoint.values, "checksum": _checksum(tensors), "checksum_of_values": _checksum_of(checkpoint.values)}
    )
    try:
        atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata={"training": values}))
    except SafetensorError as error:  # what the library raises instead of OSError
        raise WriteError(f"cannot write {path} ({error}): free disk space; older checkpoints are unchanged") from None
    for old in list_checkpoints(folder)[_KEPT:]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the paths of a run's checkpoints, the newest first."""
    return sorted((path for path in folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)), reverse=True)


def step_of(path: Path) -> int:
    """Return the number of steps that were done when this checkpoint was written."""
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def load_checkpoint(folder: Path, step: int | None = None) -> Checkpoint:
    """Return the newest checkpoint, or the one of `step`.

    CheckpointError if it is missing or damaged; the message names another checkpoint to resume from, if there is one.
    """
    paths = list_checkpoints(folder)
    wanted = paths if step is None else [path for path in paths if step_of(path) == step]
    if not wanted:
        existing = ", ".join(str(step_of(path)) for path in paths) or "none"
        of_step = "" if step is None else f" of step {step}"
        raise CheckpointError(
            f"{folder} has no checkpoint{of_step} (it has: {existing}): name the folder of a run, or start a new run"
        )
    path = wanted[0]
    try:
        read_header(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            values = parse_json(file.metadata()["training"])
        is_old = values.keys() <= _OLD_KEYS
        of_values = None if is_old else values.pop("checksum_of_values")
        if values.pop("checksum") != _checksum(tensors) or not (is_old or of_values == _checksum_of(values)):
            raise ValueError("its checksum is wrong")
    except (CheckpointError, SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        others = [step_of(other) for other in paths if other != path]
        advice = f"resume from the checkpoint of step {others[0]}" if others else "there is no other checkpoint"
        remedy = Remedy("step", str(others[0])) if others else None
        raise CheckpointError(f"the checkpoint {path} is damaged ({error}): {advice}", remedy=remedy) from None
    return Checkpoint(tensors, values)


def _checksum_of(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        content: Any = tensors[name].cpu().reshape(-1).view(torch.uint8).numpy()  # crc32 takes any buffer
        checksum = zlib.crc32(content, zlib.crc32(name.encode(), checksum))
    return checksum
