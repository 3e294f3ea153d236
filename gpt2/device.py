"""Convert the names of devices and dtypes that users write to torch's objects, and check those of a model.

It depends on torch only.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch
from torch import nn

from gpt_config.errors import DeviceError, InputError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
}


def resolve_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the floating-point dtype of that name. Raises DeviceError with a list of the names if it is unknown."""
    if isinstance(name, torch.dtype) and name in DTYPES.values():
        return name
    if not isinstance(name, str) or name not in DTYPES:
        raise DeviceError(f"dtype {name!r} is unknown: use one of {', '.join(DTYPES)}, or for a language model int8 or auto")
    return DTYPES[name]


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device of that name; "auto" is an accelerator if there is one, otherwise the CPU.

    Raises DeviceError with a list of the available devices if the name is unknown or this machine has no such device.
    """
    if isinstance(name, torch.device):
        name = str(name)
    available = _available_devices()
    if name == "auto":
        return torch.device(available[-1])
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise DeviceError(f"device {name!r} is unknown: this machine has {', '.join(available)} (or say auto)") from None
    n_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in available or (device.index or 0) >= n_devices:
        raise DeviceError(f"device {name!r} is not available: this machine has {', '.join(available)} (or say auto)")
    return device


def _available_devices() -> list[str]:
    """Return the device types of this machine, the preferred one last."""
    mps = getattr(torch.backends, "mps", None)
    return ["cpu"] + ["mps"] * bool(mps and mps.is_available()) + ["cuda"] * torch.cuda.is_available()


def check_one_dtype(model: nn.Module) -> None:
    """Raise InputError if the weights of `model` have several dtypes, or if an int8 model was converted to another dtype."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    is_int8 = any(tensor.dtype == torch.int8 for tensor in tensors.values())
    for name, dtype in dtypes.items():
        if is_int8 and dtype != torch.float32:
            raise InputError(
                f"{name} is {dtype}, but an int8 model computes in float32: load it again with dtype='int8', or without int8"
            ) from None
    first = next(iter(dtypes), "")
    for name, dtype in dtypes.items():
        if dtype != dtypes[first]:
            raise InputError(
                f"the model mixes dtypes ({name} is {dtype}, {first} is {dtypes[first]}): convert all with model.to({dtype})"
            ) from None


def has_matrix_units() -> bool:
    """Return whether this CPU has AMX and oneDNN may use it.

    Matrices of bfloat16 and of int8 are then multiplied faster than matrices of float32.
    """
    # The function is private: if a version of torch lacks it, assume that there is no AMX.
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return _onednn_may_use("AMX") and bool(has_amx())


def has_bfloat16_units() -> bool:
    """Return whether this CPU multiplies matrices of bfloat16 faster than those of float32.

    It has AMX, or AVX-512 with instructions for bfloat16, and oneDNN may use them.
    """
    has_avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return has_matrix_units() or (_onednn_may_use("AMX", "BF16", "FP16") and bool(has_avx512()))


def has_float16_units() -> bool:
    """Return whether this CPU has instructions for float16 (AVX-512 FP16) and oneDNN may use them.

    Without them torch multiplies matrices of float16 very slowly.
    """
    takes_float16 = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    return _onednn_may_use("AMX", "FP16") and bool(takes_float16())


def _onednn_may_use(*names: str) -> bool:
    """Return whether oneDNN may use instructions of one of these names. A variable can limit them."""
    # oneDNN reads both variables; the second is the older one.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    return bool({*names, "ALL", "DEFAULT"} & set(limit.upper().split("_")))


def mkl_is_slow() -> bool:
    """Return whether torch multiplies with MKL on an AMD processor with AVX-512.

    MKL does not use its fastest code there, but oneDNN does.
    """
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return "AuthenticAMD" in _processor()


@functools.cache
def _processor() -> str:
    """Return a line with the name of the processor's maker, as far as the system has one."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return platform.processor()  # on Windows it ends with the maker's name


def free_memory(device: str | torch.device = "cpu") -> int | None:
    """Return the free memory of the device in bytes, without swapping; None if the system does not report it."""
    kind = torch.device(device).type
    if kind == "cpu":
        return memory_of_machine("MemAvailable")
    if kind != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # reserved by torch for reuse
    return torch.cuda.mem_get_info(device)[0] + kept


def memory_of_machine(name: str) -> int | None:
    """Return a size of /proc/meminfo in bytes, such as that of MemTotal; None on other systems than Linux."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
