"""The memory that a run needs at least, compared with what the machine has. It computes from sizes and allocates nothing."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gpt2.training.distributed import Processes
from gpt_config.errors import ConfigError
from gpt_config.model_config import GPT2Config
from gpt_config.training_config import TrainingConfig

_WEIGHT = 4  # bytes of a parameter in float32
_STATE = 16  # bytes of a parameter that is trained: weight, gradient and the two moments of AdamW
_IDS = 16  # bytes of a token of a batch: its id and its target, int64
# Bytes per token, layer and channel that the backward pass needs at least: the input of each matrix and norm, in 16 bits, or
# with gradient checkpointing the input of each block, in float32.
_ACTIVATIONS, _BLOCK_INPUT = 32, 4
# Where Linux states the memory of a container: in version 2 of cgroups, and in version 1.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_model_memory(model: GPT2Config, processes: Processes, *, is_sharded: bool = False) -> None:
    """Raise ConfigError, which names the memory, if a new model of this shape cannot be trained on the device."""
    n_holders, total = processes.world_size if is_sharded else 1, total_memory(processes.device)
    needed = _STATE * model.n_parameters // n_holders
    if total is not None and needed > total:
        raise ConfigError(
            f"n_embd={model.n_embd} and n_layer={model.n_layer} need at least {_gigabytes(needed)} of memory for weights, "
            f"gradients and moments, and {_owner(processes.device)} has {_gigabytes(total)}: choose a smaller model",
            field="n_embd",
            other_fields=("n_layer",),
        )


def check_batch_memory(
    model: GPT2Config, config: TrainingConfig, processes: Processes, tokens_per_row: int, n_rows: int = 0
) -> None:
    """Raise ConfigError, which names the memory, if the rows of a step cannot be computed on the device.

    A process computes `n_rows` rows of `tokens_per_row` tokens at once.
    """
    share, total = config.batch_size // processes.world_size, total_memory(processes.device)
    kept = model.n_layer * model.n_embd * (_BLOCK_INPUT if config.gradient_checkpointing else _ACTIVATIONS)
    needed = tokens_per_row * (share * _IDS + n_rows * kept) + _WEIGHT * model.n_parameters
    if total is not None and needed > total:
        raise ConfigError(
            f"batch_size={config.batch_size} with rows of {tokens_per_row} tokens needs at least {_gigabytes(needed)} of "
            f"memory, and {_owner(processes.device)} has {_gigabytes(total)}: choose fewer rows, a shorter context or more "
            "accumulation",
            field="batch_size",
        )


def total_memory(device: torch.device) -> int | None:
    """Return the bytes of memory of a GPU, or of this machine or its container with swap space; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _swap()]
    for path in _CONTAINER_LIMITS:
        try:
            sizes.append(int(Path(path).read_text()) + _swap())
        except (OSError, ValueError):  # there is no such file, or no limit ("max")
            continue
    return min(sizes)


def _swap() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal:"))
    except (OSError, ValueError, StopIteration):
        return 0


def _owner(device: torch.device) -> str:
    return "this machine" if device.type == "cpu" else str(device)


def _gigabytes(n_bytes: int) -> str:
    return f"{-(-n_bytes // 10**9):,} GB"
