"""What the machine is good for: which precision pays, how fast it multiplies, how it keeps memory. It knows no model."""

from __future__ import annotations

import ctypes
import sys
import time

import torch

from gpt2.device import has_matrix_units

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: `name`, or for "auto" bfloat16 where the hardware multiplies it faster than float32.

    That is a GPU since Ampere and a CPU with AMX. Older GPUs get float16, all others float32.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if has_matrix_units() else torch.float32
    return torch.float32


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a large matrix product, the best that is seen in a tenth of a second."""
    size = 8192 if device.type == "cuda" else 1536
    # Not of ones, which a GPU multiplies faster, for they take less power; and not from the numbers that a run draws.
    numbers = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, generator=numbers, device=device).to(dtype)
    seconds: list[float] = []
    while sum(seconds) < 0.1 or len(seconds) < 2:  # the first one may be slow
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> None:
    """Ask glibc's malloc to keep what is freed. By default each large tensor is mapped anew, and every page of it zeroed
    by the kernel at its first use: a tenth of a small model's step on a CPU. It does nothing where there is no glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
