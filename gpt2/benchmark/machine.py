"""The machine of a benchmark: hardware, versions, memory size and memory bandwidth. It knows configs, not engines."""

from __future__ import annotations

import datetime
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_config.cores import available_cores
from gpt_config.model_config import GPT2Config

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "transformers", "ctranslate2", "llama-cpp-python", "gguf", "tiktoken", "tokenizers", "numpy")


def environment(threads: int, device: torch.device) -> dict[str, Any]:
    """What a reader needs to compare results: date, processor, cores, threads, accelerator, memory and versions."""
    from gpt2.device import memory_of_machine

    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": available_cores().count,
        "threads": threads,
        "device": _device_name(device),
        "memory_gb": round(memory / 1e9, 1) if (memory := memory_of_machine("MemTotal")) is not None else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := installed_version(name))},
    }


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def free_memory(device: str = "cpu") -> int | None:
    """Free memory of the device in bytes, without swapping; None if the system does not report it."""
    from gpt2 import device as devices  # here, because it imports torch

    return devices.free_memory(device)


def peak_memory(device: str = "cpu") -> int:
    """The peak memory of this process on the device, in bytes.

    On a CPU it includes the pages of mapped files that were read. On a GPU it is the memory of tensors.
    """
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def read_per_token(config: GPT2Config) -> int:
    """The number of parameters read per token: all except the position embeddings, of which only one row is read."""
    return config.n_parameters - config.n_positions * config.n_embd


class WeightStream:
    """Reads as many bytes as the float32 weights of a model have, as fast as the machine can.

    If the model does not fit into the CPU's caches, no engine can compute a token in less time than one read.
    """

    N_READS = 16

    def __init__(self, config: GPT2Config, device: torch.device) -> None:
        import torch

        self._device = device
        self._vector = torch.ones(1024, device=device)
        self._matrix = torch.ones(max(1, read_per_token(config) // 1024), 1024, device=device)
        self.n_bytes = 4 * self._matrix.numel()

    def read(self) -> None:
        """Read all bytes N_READS times, because the first read after a pause is slower than the others.

        It is a matrix-vector product: it does little except reading, and PyTorch divides it among the threads.
        """
        from gpt2.training.hardware import synchronize

        for _ in range(self.N_READS):
            self._matrix @ self._vector
        synchronize(self._device)


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(device)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
