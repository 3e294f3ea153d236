"""Runs of several processes: rank, communication and sharing of the model, with torch.distributed.

`torchrun` starts the processes and sets RANK, LOCAL_RANK and WORLD_SIZE in their environment; without it there is one
process. Does not depend on data or on the training loop.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt2.device import resolve_device
from gpt_config.errors import Remedy, TrainingError
from gpt_config.training_config import TrainingConfig

# How long a process waits for the others in a step before it ends with an error. The longest wait in a healthy run is for
# rank 0 to write a checkpoint.
_TIMEOUT = datetime.timedelta(minutes=10)
# How long it waits for work that one process does for all, such as the encoding of a large text. A process that ends closes
# its connections, so its loss is noticed at once.
_WORK_TIMEOUT = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """The rank and device of this process, and the number of processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    patient: Any = field(default=None, repr=False, compare=False)  # torch's group for `wait_for_work`

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of `value` over all processes; `value` is overwritten if there are several."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in at least one process; the answer is the same in all of them."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world_size > 1:
            dist.barrier()

    def wait_for_work(self) -> None:
        """Wait until all processes have called this, for hours if one of them works for all, such as encoding a text."""
        if self.world_size > 1:
            dist.barrier(self.patient)


@contextlib.contextmanager
def join_processes(device: str = "auto", *, timeout: datetime.timedelta | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun started, or run as one. TrainingError if the connection to another one is lost.

    `timeout` is the longest wait for the others in a step, by default 10 minutes.
    """
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
        dist.init_process_group("nccl" if processes.device.type == "cuda" else "gloo", timeout=timeout or _TIMEOUT)
        yield replace(processes, patient=dist.new_group(timeout=_WORK_TIMEOUT, backend="gloo"))
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, TrainingError) or not _is_lost_connection(error):
            raise
        is_lost = True
        atexit.register(leave_at_once, 1)
        raise TrainingError(
            f"process {rank} of {world_size} lost the connection to another process ({str(error).splitlines()[0][:200]}): "
            "see the message of that process, then resume the run",
            remedy=Remedy("resume"),
        ) from None
    finally:
        if dist.is_initialized() and not is_lost:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def leave_at_once(status: int) -> NoReturn:
    """Exit a process of a group with `status`, without the cleanup of Python and torch.

    FSDP's caches keep the group alive, and with it the group's threads, after Python's shutdown. A thread that then asks for
    Python's lock aborts the process ("terminate called without an active exception"). After a lost connection, torch's
    cleanup waits for the lost process, sometimes forever.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def _is_lost_connection(error: BaseException) -> bool:
    words = ("connection", "timed out", "timeout", "gloo", "nccl", "peer", "socket", "broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def share_model(module: nn.Module, blocks: nn.ModuleList, processes: Processes, config: TrainingConfig) -> nn.Module:
    """Return `module` wrapped for training: each process has a copy (DDP), or a part of each block (FSDP2).

    TrainingError for sharding=fsdp with one process.
    """
    if config.sharding == "fsdp":
        return _fully_sharded(module, blocks, processes)
    if processes.world_size == 1:
        return module
    device_ids = [processes.device] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=device_ids)


def _fully_sharded(module: nn.Module, blocks: nn.ModuleList, processes: Processes) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    if processes.world_size == 1:
        raise TrainingError("sharding=fsdp needs several processes, and there is one: start the run with torchrun")
    for block in blocks:
        fully_shard(block)
    fully_shard(module)
    return module


def without_exchange(module: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """Exchange gradients only in the last part of a step, if its rows are computed in parts."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and not is_last:
        return module.no_sync()
    set_exchange: Any = getattr(module, "set_requires_gradient_sync", None)  # of FSDP2
    if set_exchange is not None:
        set_exchange(is_last)
    return contextlib.nullcontext()
