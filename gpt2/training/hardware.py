"""Properties of the machine: the fastest precision, the speed of matrix products, malloc. Does not depend on the model."""

from __future__ import annotations

import ctypes
import sys
import time

import torch

from gpt2.device import has_bfloat16_units

# Options of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1  # bytes that may be free at the end of the heap before malloc returns them to the system
_M_MMAP_MAX = -4  # number of allocations that may have a separate memory mapping


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for matrix products: the one called `name`, or for "auto" the fastest one on `device`.

    "auto" is bfloat16 on a GPU since Ampere and on a CPU with instructions for it, float16 on an older GPU, and float32
    elsewhere.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if has_bfloat16_units() else torch.float32
    return torch.float32


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best speed of a large matrix product, in operations per second, measured for at least 0.1 seconds."""
    size = 8192 if device.type == "cuda" else 1536
    # Random numbers, because a GPU multiplies matrices of ones faster: these take less power. They come from a separate
    # generator, because the random state of the run must not change.
    numbers = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, generator=numbers, device=device).to(dtype)
    seconds: list[float] = []
    while sum(seconds) < 0.1 or len(seconds) < 2:  # the first product may be slow
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds))


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has finished its queued work. Does nothing on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for later tensors. Does nothing without glibc.

    By default, malloc maps new memory for each large tensor, and the kernel zeroes each page at its first use. That takes
    10% of a small model's step on a CPU.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
