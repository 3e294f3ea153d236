"""Several processes, one run: who this process is, and how the model is shared. The engine is torch.distributed.

`torchrun` starts the processes and tells each its rank in the environment; without it there is one. It knows nothing of
data or steps.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt2.device import resolve_device
from gpt_config.errors import Remedy, TrainingError
from gpt_config.training_config import TrainingConfig

# After so long without an answer the other processes are given up. The longest wait in a sound run is for the first
# process to write a checkpoint.
_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over all processes."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in at least one process, so that all of them do the same."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Meet the processes that torchrun started, or be alone. TrainingError if one of them is lost on the way."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device == "auto" and world_size > 1 and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    processes = Processes(rank, world_size, resolve_device(device))
    if world_size == 1:
        yield processes
        return
    if processes.device.type == "cuda":
        torch.cuda.set_device(processes.device)
    is_lost = False
    try:
        dist.init_process_group("nccl" if processes.device.type == "cuda" else "gloo", timeout=_TIMEOUT)
        yield processes
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, TrainingError) or not _is_lost_connection(error):
            raise
        is_lost = True
        atexit.register(leave_at_once, 1)
        raise TrainingError(
            f"process {rank} of {world_size} has lost another one ({str(error).splitlines()[0][:200]}): "
            "see that one's message, then continue the run",
            remedy=Remedy("resume"),
        ) from None
    finally:
        if dist.is_initialized() and not is_lost:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def leave_at_once(status: int) -> NoReturn:
    """End a process of a group, without Python's and torch's farewells.

    FSDP's caches keep the group, and so its threads, beyond the end of Python; a thread that asks for Python's lock then
    aborts the process ("terminate called without an active exception"). And after a loss, torch's farewell waits for the
    lost process, sometimes for ever.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def _is_lost_connection(error: BaseException) -> bool:
    words = ("connection", "timed out", "timeout", "gloo", "nccl", "peer", "socket", "broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def share_model(module: nn.Module, blocks: nn.ModuleList, processes: Processes, config: TrainingConfig) -> nn.Module:
    """`module` as all processes train it together: a copy each (DDP), or a part each (FSDP2, by block)."""
    if config.sharding == "fsdp":
        return _fully_sharded(module, blocks, processes)
    if processes.world_size == 1:
        return module
    device_ids = [processes.device] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=device_ids)


def _fully_sharded(module: nn.Module, blocks: nn.ModuleList, processes: Processes) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    if processes.world_size == 1:
        raise TrainingError("sharding=fsdp shares the model among processes, and there is one: start it with torchrun")
    for block in blocks:
        fully_shard(block)
    fully_shard(module)
    return module


def without_exchange(module: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """While a step's rows are done in parts, gradients are exchanged in the last part only."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and not is_last:
        return module.no_sync()
    set_exchange: Any = getattr(module, "set_requires_gradient_sync", None)  # FSDP's
    if set_exchange is not None:
        set_exchange(is_last)
    return contextlib.nullcontext()
