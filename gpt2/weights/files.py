"""Weight files: reads safetensors, sharded safetensors and `pytorch_model.bin`, as views of the mapped file.

It depends on file formats, not on GPT-2. From a pickle, only tensors are loaded: it can run no code.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2.weights.folder import weight_files
from gpt2.weights.safetensors_header import read_header
from gpt_config.errors import CheckpointError
from gpt_config.file_reading import open_regular
from gpt_config.lfs import pointer_message


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of `folder` by their names in the files, on the CPU, and mapped from disk if the format allows it.

    Raises CheckpointError, which names the file, if one is missing or damaged.
    """
    files = weight_files(folder)
    if not files:
        raise CheckpointError(
            f"{folder} has no weights: it needs model.safetensors, its shards with model.safetensors.index.json, "
            "or pytorch_model.bin"
        )
    tensors: dict[str, Tensor] = {}
    for path in files:
        content = read_file(path)
        twice = tensors.keys() & content.keys()
        if twice:
            raise CheckpointError(f"{path} and another shard both contain {min(twice)!r}: download the files again")
        tensors |= content
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one file, which is read as safetensors if its name says so, and otherwise as a pickle.

    Raises CheckpointError if it is damaged.
    """
    if message := pointer_message(path):
        raise CheckpointError(message)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    read_header(path)  # refuses more than safe_open, such as a name twice, and so the same files as the other engines
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (`file` is not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        reason = _first_line(error)
        raise CheckpointError(f"{path} is not a readable safetensors file ({reason}): download it again") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    content = unpickle(path)
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise CheckpointError(f"{path} does not contain a state dict of tensors: save model.state_dict() itself")
    check_tensors(content, path)
    return content


def unpickle(path: Path) -> object:
    """Return what torch has saved in a file: tensors, mapped if the format allows it, and plain containers of them.

    Raises CheckpointError if the file is damaged or contains other objects, which are never unpickled.
    """
    _check_archive(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format before 2020 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged pickle can raise anything, and torch's message advises to load it without protection
        raise CheckpointError(
            f"{path} is not a readable file of tensors: it is damaged or contains other objects, which are never unpickled; "
            "download it again, or save it as safetensors"
        ) from None


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless all values from a pickle are ordinary tensors with their numbers, by names."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name!r:.80} is not a tensor with a name: save model.state_dict() itself")
        if fault := _fault_of(tensor, path.stat().st_size):
            raise CheckpointError(f"{path}: {name!r:.80} is {fault}: save an ordinary tensor, with its numbers, on the CPU")


def _check_archive(path: Path) -> None:
    """Raise CheckpointError if a zip archive is damaged. torch.load does not compare its checksums.

    A compressed archive could be a thousand times smaller than its content, and torch writes none.
    """
    try:
        with open_regular(path) as file:
            if file.read(4) != b"PK\x03\x04":
                return
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("it is compressed")
                if len(set(names)) < len(names):
                    raise ValueError("it contains a name twice")
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {damaged!r:.80} is wrong")
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror or error}): check the file") from None
    # zipfile raises many kinds of error for a damaged archive.
    except (ValueError, RuntimeError, zipfile.BadZipFile, EOFError, struct.error, NotImplementedError, IndexError) as error:
        raise CheckpointError(
            f"{path} is a damaged zip archive ({_first_line(error)}): download it again, or save it as safetensors"
        ) from None


def _fault_of(tensor: Tensor, file_size: int) -> str:
    """Return why a tensor of a file cannot be a weight, or "" if it can."""
    if tensor.device.type == "meta":
        return "on the device meta, without numbers"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    # Strides of 0 repeat the same numbers: a few bytes can stand for any number of them.
    n_bytes = tensor.numel() * tensor.element_size()
    return f"larger ({n_bytes} bytes) than its file ({file_size} bytes)" if n_bytes > file_size else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
