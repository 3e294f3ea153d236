"""The machine a benchmark runs on: its names and versions, how fast it reads memory, how much of that there is."""

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
    """What a reader must know to compare figures: processor, cores, threads, accelerator, versions, date."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": available_cores().count,
        "threads": threads,
        "device": _device_name(device),
        "memory_gb": round(memory / 1e9, 1) if (memory := _meminfo("MemTotal")) is not None else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := installed_version(name))},
    }


def installed_version(package: str) -> str | None:
    """The version of a package that pip installed, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def free_memory(device: str = "cpu") -> int | None:
    """Bytes of the device's memory that can be had, without swapping, where the system says so."""
    if device == "cpu":
        return _meminfo("MemAvailable")
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, to be used again
    return torch.cuda.mem_get_info(device)[0] + kept


def peak_memory(device: str = "cpu") -> int:
    """The most bytes of the device's memory that this process has had: of a CPU's, mapped files that it has read among them,
    of a GPU's, what tensors took."""
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


def n_parameters(config: GPT2Config) -> int:
    """Weights and biases of a model."""
    C, inner = config.n_embd, config.inner_dim
    a_layer = 4 * C + (C + 1) * 3 * C + (C + 1) * C + (C + 1) * inner + (inner + 1) * C
    return (config.vocab_size + config.n_positions) * C + config.n_layer * a_layer + 2 * C


def read_per_token(config: GPT2Config) -> int:
    """Parameters that are read for each token: all but the positions, of which it is one row."""
    return n_parameters(config) - config.n_positions * config.n_embd


class WeightStream:
    """Reads as many bytes as the float32 weights of a model have, as fast as the machine can: the least that a token of
    a model that does not fit the caches takes, whatever computes it."""

    N_READS = 16

    def __init__(self, config: GPT2Config, device: torch.device) -> None:
        import torch

        self._device = device
        self._vector = torch.ones(1024, device=device)
        self._matrix = torch.ones(max(1, read_per_token(config) // 1024), 1024, device=device)
        self.n_bytes = 4 * self._matrix.numel()

    def read(self) -> None:
        """Read it all N_READS times: the first after a pause is slower than the others. A product with a vector does next
        to nothing else, and is shared among the threads."""
        from gpt2.training.hardware import synchronize

        for _ in range(self.N_READS):
            self._matrix @ self._vector
        synchronize(self._device)


def _meminfo(name: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


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
