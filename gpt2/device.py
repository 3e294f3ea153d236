"""Convert the names of devices and dtypes that users write to torch's objects. It depends on torch only."""

from __future__ import annotations

import os

import torch

from gpt_config.errors import DeviceError

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


def has_matrix_units() -> bool:
    """Return whether this CPU has AMX and oneDNN may use it.

    Matrices of bfloat16 and of int8 are then multiplied faster than matrices of float32.
    """
    # oneDNN reads both names; the second is the older one.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    if not {"AMX", "ALL", "DEFAULT"} & set(limit.upper().split("_")):
        return False
    # The function is private: if a version of torch lacks it, assume that there is no AMX.
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(has_amx())
